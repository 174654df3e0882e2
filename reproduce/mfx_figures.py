"""Magic Fixup's figures of what it is made of: 4, latent initialization; 5, motion models; 9, what each one teaches.

As in dd_figures.py: what a figure is to show is also measured, and the pictures are the first ones, never chosen.
"""

import torch

import samplers
from reproduce import mfx_tables
from reproduce.lab import MFX, Outcome, item, judge, percent, plus_minus, progress
from reproduce.metrics import is_surely_less, mean_error
from reproduce.mfx_tables import AFFINE, ALONE, FLOW, FULL, OBJECTS, SHADOWS, surely_above, surely_below
from toy import world

# ---------------------------------------------------------------------------------------------------------------------
# Figure 4

USED, HIDDEN = "as it is used", "the coarse edit hidden"
WITH, WITHOUT = "from the coarse edit", "from noise alone"
OFF = {"brightness": 4, "blacks": 4, "squared error": 2}  # what is measured: digits after the point that are shown


def sample_from(lab, model, edits, latent_init, hidden):
    """MagicFixup.sample written out, each edit with noise of its own -> (n, 3, S, S) in [0, 1].

    hidden  the model is not shown the coarse edit, as in a fifth of its training, and a grey picture for its reference;
            it may still start from the coarse edit
    """
    sampler, out = samplers.make_sampler("ddim", model.schedule, mfx_tables.count_steps(model), eta=1.0), []
    for i in progress(range(0, len(edits["truth"]), 8)):
        edit = mfx_tables.take(edits, i, 8)
        if hidden:
            edit["reference"] = torch.full_like(edit["reference"], 0.5)
        reference, coarse, mask = mfx_tables.encode_edit(model, edit)
        epsilon = lab.noise(coarse, i)
        x_T = sampler.noise_to(0, coarse, epsilon) if latent_init else epsilon  # equation 4
        shown = (0 * coarse, 0 * mask) if hidden else (coarse, mask)
        step_noise = samplers.make_step_noise(coarse.shape[1:], list(range(i, i + len(coarse))))
        z = samplers.run_sampler(model.denoiser(reference, *shown, sampler.timesteps), x_T, sampler, 0, step_noise)
        out.append(model.decode(z).float().cpu())
    return (torch.cat(out) / 2 + 0.5).clamp(0, 1)


def measure_darkness(x, truth):
    """How far from the truth brightness is, and the brightness that a twentieth of a picture is darker than; and the
    squared error in thousandths: {what: (n,)}. x, truth (n, 3, S, S) in [0, 1]"""
    grey, true = (y.mean(1).flatten(1) for y in (x, truth))
    values = ((grey.mean(1) - true.mean(1)).abs(), (grey.quantile(0.05, dim=1) - true.quantile(0.05, dim=1)).abs(),
              1000 * (x - truth).square().mean((1, 2, 3)))
    return dict(zip(OFF, values))


@item("mfx_figure4", "Figure 4", chapter=MFX, needs=("ablation_weights",))
def figure4(lab):
    """Starting from pure noise, the model struggles with deep blacks and makes up content. Starting from the coarse
    edit under noise makes a drastic difference.

    {n} edits of grass and water at night, {side} pixels a side, by the ablation's full model, both ways, {steps} steps.
    Off from the truth: brightness, the brightness that a twentieth of the picture is darker than (blacks), squared
    error in thousandths. A control: the model without its extractor, the coarse edit hidden and its reference grey, so
    that only its start can tell it of the night.
    """
    models, n = mfx_tables.load_ablation(lab, FULL, ALONE), lab.count(48, 8)
    scenes = lab.scenes(n, 64)
    scenes.time[:] = world.TIMES.index("night")
    scenes.ground[:] = torch.tensor([world.GROUNDS.index(g) for g in ("grass", "water")])[torch.arange(n) % 2]
    edits = mfx_tables.edit_scenes(scenes, 64, models[FULL].size)
    outputs, off = {}, {}
    for how, name in progress(((USED, FULL), (HIDDEN, ALONE))):
        both = {start: sample_from(lab, models[name], edits, start == WITH, how == HIDDEN) for start in (WITH, WITHOUT)}
        a, b = (measure_darkness(x, edits["truth"]) for x in both.values())
        off[how] = {WITH: {what: mean_error(x) for what, x in a.items()},
                    WITHOUT: {what: mean_error(x) for what, x in b.items()},
                    "surely less": {what: is_surely_less(a[what], b[what]) for what in a}}
        outputs |= {start if how == USED else f"{HIDDEN}: {start}": x for start, x in both.items()}
    columns = {"coarse edit": edits["coarse"], "truth": edits["truth"], **outputs}
    mfx_tables.draw_columns(lab, columns, range(min(n, 4)), "mfx_figure4.png")
    table = [["", "", *OFF]] + [[how, start, *(plus_minus(row[start][what], OFF[what]) for what in OFF)]
                                for how, row in off.items() for start in (WITH, WITHOUT)]
    facts = {"n": n, "side": models[FULL].size, "steps": mfx_tables.count_steps(models[FULL]), "off": off}
    return Outcome(facts, figure4_verdict(off), table,
                   [("mfx_figure4.png", "Figure 4: edits at night, the first four.")])


def figure4_verdict(off):
    """Drastic: surely less, and at most half."""
    parts = []
    for how, found in off.items():
        drastic = [what for what, sure in found["surely less"].items()
                   if sure and found[WITH][what][0] <= found[WITHOUT][what][0] / 2]
        numbers = "; ".join(f"{what} {plus_minus(found[WITH][what], digits)} and "
                            f"{plus_minus(found[WITHOUT][what], digits)}" for what, digits in OFF.items())
        parts.append((len(drastic) == len(OFF), f"{how}, the errors {WITH} and {WITHOUT} are: {numbers}; surely less, "
                      f"and at most half, are {', '.join(drastic) or 'none'}"))
    return judge(*parts)


# ---------------------------------------------------------------------------------------------------------------------
# Figure 5

PINK = torch.tensor([1.0, 0.0, 1.0])[:, None, None]  # which nothing in the toy world is


@item("mfx_figure5", "Figure 5", chapter=MFX)
def figure5(lab):
    """Optical flow warps a frame towards the target the most accurately. Segments moved by similarity transforms are
    closer to a user's collage, and align less well.

    {n} pairs of frames of held-out clips, both warps of each, holes painted in: {distance} and squared error in
    thousandths to the target. They differ in {differ} of the pixels.
    """
    n, size, distance = lab.count(112, 16), lab.model.size, lab.perceptual[0]
    edits = mfx_tables.make_held_out_pairs(n, size)
    n = len(edits["flow"]["truth"])
    truth, reference = edits["flow"]["truth"], edits["flow"]["reference"]
    warps = {"reference": (reference, torch.ones_like(edits["flow"]["mask"]))}
    warps |= {test: (e["coarse"], e["mask"]) for test, e in edits.items()}
    found, each, table = {}, {}, [["", distance, "squared error", "outside the holes", "holes"]]
    for who, (x, mask) in warps.items():
        error = 1000 * (x - truth).square().mean(1, keepdim=True)
        each[who] = {"distance": lab.distance(x * 2 - 1, truth * 2 - 1).mean((1, 2)),
                     "squared": error.mean((1, 2, 3)), "outside": (error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))}
        distances, squares, outside = (mean_error(x) for x in each[who].values())
        holes = percent(1 - mask.mean(), 1)
        found[who] = {"distance": distances, "squared": squares, "outside": outside, "holes": holes}
        table.append([who, plus_minus(distances, 4), plus_minus(squares), plus_minus(outside), holes])
    less, parts = {}, []
    for key, what in (("distance", distance), ("squared", "squared error")):
        a, b = each["flow"][key], each["affine"][key]
        less[key] = {"surely less": is_surely_less(a, b), "difference": mean_error(a.double() - b.double())}
        sure = less[key]["surely less"]
        flow, affine = (found[who][key][0] for who in ("flow", "affine"))
        parts.append((sure, f"flow's {what} is {flow:.4f}, the collage's {affine:.4f}: {'' if sure else 'not '}surely "
                      f"less, the difference being {plus_minus(less[key]['difference'], 4)}"))
    columns = {"reference": reference, "target": truth}
    for test, called in (("flow", "warped by flow"), ("affine", "piecewise affine")):
        x = edits[test]["coarse"]
        columns[f"{called}, holes pink"] = torch.where(edits[test]["mask"] > 0, x, PINK)
        columns[f"{called}, as the model is given it"] = x
    mfx_tables.draw_columns(lab, columns, range(min(n, 5)), "mfx_figure5.png")
    return Outcome(
        {"n": n, "distance": distance, "differ": mfx_tables.compare_warps(edits), "warps": found, "less": less},
        judge(*parts), table, [("mfx_figure5.png", "Figure 5: both motion models, the first pairs.")])


@item("mfx_figure9", "Figure 9", chapter=MFX, needs=("ablation_weights",))
def figure9(lab):
    """Trained on flow alone, the model stays conservative, close to the coarse edit. Trained on piecewise affine edits
    alone it hallucinates and loses the identity of objects; trained on both it has the best of each.

    {n} held-out edits of a user's kind through three models of the ablation, {side} pixels a side: squared error
    against the true re-render, and squared distance from the coarse edit where shadows and reflections have to change,
    over the last model's.
    """
    models, n = mfx_tables.load_ablation(lab, FLOW, AFFINE, FULL), lab.count(96, 24)
    edits, names = mfx_tables.make_user_edits(n, models[FULL].size), ("flow only", "affine only", "both")
    shown = {name: mfx_tables.fix_user_edits(model, n) for name, model in zip(names, models.values())}
    error, moved = mfx_tables.compare_to_truth(shown, edits, "both"), mfx_tables.compare_to_coarse(shown, edits, "both")
    mfx_tables.draw_edits(lab, edits, {"coarse edit": edits["coarse"]} | shown, "mfx_figure9.png")
    table = [["", *names, "flow only / both", "affine only / both"]]
    for what, found in (("error", error), ("distance from the coarse edit", moved)):
        for where, f in found.items():
            table.append([f"{what}, {where}", *(f"{f['error'][who]:.5f}" for who in names),
                          *(plus_minus(f["ratio"][who]) for who in names[:2])])
    return Outcome({"n": n, "side": models[FULL].size, "error": error, "distance from the coarse edit": moved},
                   figure9_verdict(error, moved[SHADOWS]["ratio"]["flow only"]), table,
                   [("mfx_figure9.png", "Figure 9, the first edit of each kind.")])


def figure9_verdict(error, away):
    objects = error[OBJECTS]["ratio"]["affine only"]
    better = [f"{who} is, {where}" for where, f in error.items() for who, r in f["ratio"].items() if surely_below(r)]
    return judge(
        (surely_below(away), "trained on flow only, its squared distance from the coarse edit, where that has to "
         f"change, is {plus_minus(away)} times that of the model trained on both"),
        (surely_above(objects), f"trained on affine only, its error on the edited objects is {plus_minus(objects)} "
         "times as large"),
        (not better, "against the truth neither is surely better than both anywhere" if not better else
         f"against the truth some are surely better than both: {'; '.join(better)}"),
    )
