"""Magic Fixup's figures of what it is made of: 4, latent initialization; 5, motion models; 9, what each one teaches.

As in dd_figures.py: what a figure is to show is also measured, and the pictures are the first ones, never chosen.
"""

import torch

import diffdiff
import diffusion
from reproduce import charts
from reproduce.lab import Outcome, item, judge, mean_error, plus_minus, surely_less, to_picture
from reproduce.mfx_ablation import STEPS, TESTS, held_out
from reproduce.mfx_tables import (
    AFFINE,
    ALONE,
    CHAPTER,
    FLOW,
    FULL,
    by_verb,
    compared,
    edits_of,
    fixed,
    models,
    regions_of,
    some,
    surely_above,
    the_edits,
    with_missing,
)
from reproduce.toy import scenes_of
from toy import world as toyworld

# ---------------------------------------------------------------------------------------------------------------------
# Figure 4

USED, HIDDEN = "as it is used", "the coarse edit hidden"
WITH, WITHOUT = "from the coarse edit", "from noise alone"
OFF = {"brightness": 4, "blacks": 4, "squared error": 2}  # what is measured: digits after the point that are shown


def drawn(lab, model, edits, latent_init, hidden):
    """MagicFixup.sample written out, each edit with noise of its own -> (n, 3, S, S) in [0, 1].

    hidden  the model is not shown the coarse edit, as in a fifth of its training; it may still start from it
    """
    sampler, out = diffusion.make_sampler("ddim", model.schedule, STEPS, eta=1.0), []
    for i in range(0, len(edits["truth"]), 8):
        reference, coarse = (model.encode_image(edits[n][i : i + 8] * 2 - 1) for n in ("reference", "coarse"))
        mask = diffdiff.down_sample(edits["mask"][i : i + 8], coarse.shape[-2:]).to(coarse)
        epsilon = lab.noise(coarse, i)
        x_T = sampler.noise_to(0, coarse, epsilon) if latent_init else epsilon  # equation 4
        shown = (0 * coarse, 0 * mask) if hidden else (coarse, mask)
        step_noise = diffusion.make_step_noise(coarse.shape[1:], list(range(i, i + len(coarse))))
        z = diffusion.run_sampler(model.denoiser(reference, *shown, sampler.timesteps), x_T, sampler, 0, step_noise)
        out.append(model.decode(z).float().cpu())
    return (torch.cat(out) / 2 + 0.5).clamp(0, 1)


def darkness(x, truth):
    """How far from the truth brightness is, and the brightness that a twentieth of a picture is darker than; and the
    squared error in thousandths: {what: (n,)}. x, truth (n, 3, S, S) in [0, 1]"""
    grey, true = (y.mean(1).flatten(1) for y in (x, truth))
    values = ((grey.mean(1) - true.mean(1)).abs(), (grey.quantile(0.05, dim=1) - true.quantile(0.05, dim=1)).abs(),
              1000 * (x - truth).square().mean((1, 2, 3)))
    return dict(zip(OFF, values))


def digits(what, found):
    return plus_minus(found[what], OFF[what])


@item(
    "mfx_figure4", "Figure 4", chapter=CHAPTER, cost=40, needs=("ablation_weights",),
    claim="Starting from pure noise, the model struggles with deep blacks and makes up content to keep mean and "
          "standard deviation near the noise's. Starting from the coarse edit under noise makes a drastic difference.",
    done="{n} edits of grass and water at night, both ways, {steps} steps. Off from the truth: brightness, the "
         "brightness that a twentieth of the picture is darker than (blacks), squared error in thousandths. Below, a "
         "control: the model without its extractor, with the coarse edit hidden, as it was in a fifth of its training. "
         "Only what it starts from can tell it of the night then.",
    table=lambda r, t: [["", "", *OFF]] + [[how, start, *[digits(what, row[start]) for what in OFF]]
                                           for how, row in r["off"].items() for start in (WITH, WITHOUT)],
    verdict=lambda r, t: figure4_verdict(r),
)
def figure4(lab):
    found, missing = models(lab, (FULL, ALONE))
    if missing:
        return Outcome({"n": 0, "steps": 0, "missing": missing, "off": {}})
    n, size = lab.count(48, 8), found[FULL].size
    scenes = scenes_of(64, n)
    scenes.time[:] = toyworld.TIMES.index("night")
    scenes.ground[:] = torch.tensor([toyworld.GROUNDS.index(g) for g in ("grass", "water")])[torch.arange(n) % 2]
    edits = edits_of(scenes, 64, size)
    jobs = [(USED, FULL, True), (USED, FULL, False), (HIDDEN, ALONE, True), (HIDDEN, ALONE, False)]
    outputs = [drawn(lab, found[name], edits, init, how == HIDDEN) for how, name, init in lab.each(jobs)]
    off = {}
    for i, how in ((0, USED), (2, HIDDEN)):
        a, b = (darkness(x, edits["truth"]) for x in outputs[i : i + 2])
        off[how] = {WITH: {what: mean_error(x) for what, x in a.items()},
                    WITHOUT: {what: mean_error(x) for what, x in b.items()},
                    "surely less": {what: bool(surely_less(a[what], b[what])) for what in a}}
    columns = (edits["coarse"], edits["truth"], *outputs)
    heads = ["coarse edit", "truth", WITH, WITHOUT, f"{HIDDEN}: {WITH}", f"{HIDDEN}: {WITHOUT}"]
    rows = [[to_picture(x[i] * 2 - 1) for x in columns] for i in range(min(n, 4))]
    lab.save(charts.sheet(rows, heads), "mfx_figure4.png")
    return Outcome({"n": n, "steps": STEPS, "missing": [], "off": off},
                   [("mfx_figure4.png", "Figure 4: edits at night, the first four.")])


def figure4_verdict(results):
    """Drastic: surely less, and at most half."""
    parts, drastic = [], {}
    for how, off in results["off"].items():
        drastic[how] = [what for what, sure in off["surely less"].items()
                        if sure and off[WITH][what][0] <= off[WITHOUT][what][0] / 2]
        numbers = "; ".join(f"{what} {digits(what, off[WITH])} and {digits(what, off[WITHOUT])}" for what in OFF)
        parts.append((len(drastic[how]) == len(OFF), f"{how}, the errors {WITH} and {WITHOUT} are: {numbers}; surely "
                      f"less, and at most half, are {', '.join(drastic[how]) or 'none'}"))
    verdict, why = with_missing(results["missing"], *parts)
    if parts and parts[1][0] and not drastic[USED]:
        why += (" Why: at every step the toy is shown the coarse edit, reads the brightness from there, and does "
                "without a trace of it in the noise. Where that trace is all that there is, it is needed.")
    return verdict, why


# ---------------------------------------------------------------------------------------------------------------------
# Figure 5

PINK = torch.tensor([1.0, 0.0, 1.0])[:, None, None]  # which nothing in the toy world is


@item(
    "mfx_figure5", "Figure 5", chapter=CHAPTER, cost=6,
    claim="Optical flow warps a frame towards the target the most accurately, but not as a user would. Segments moved "
          "by similarity transforms are closer to a user's collage, and align less well.",
    done="{n} held-out pairs, both warps of each, as the model is given them (holes painted in): {distance} and "
         "squared error in thousandths, to the target. Their colours differ by more than 0.02 in {differ} of the "
         "pixels. Objects of the toy world are flat and face the camera, so that a similarity is all that happens to "
         "them; the rest is splatted by the flow in both models.",
    table=lambda r, t: [["", r["distance"], "squared error", "outside the holes", "holes"]] + [
        [who, plus_minus(f["distance"], 4), plus_minus(f["squared"]), plus_minus(f["outside"]), f["holes"]]
        for who, f in r["warps"].items()],
    verdict=lambda r, t: judge(
        *[(f["surely less"], f"flow's {what} is {r['warps']['flow'][key][0]:.4f}, the collage's "
           f"{r['warps']['affine'][key][0]:.4f}: {'surely' if f['surely less'] else 'not surely'} less, the difference "
           f"being {plus_minus(f['difference'], 4)}")
          for key, what in (("distance", r["distance"]), ("squared", "squared error")) for f in [r["less"][key]]]),
)
def figure5(lab):
    n, size = lab.count(112, 16), lab.model.size
    edits = {test: held_out(n, test, size) for test in lab.each(TESTS)}
    truth, reference = edits["flow"]["truth"], edits["flow"]["reference"]
    nowhere = torch.ones_like(edits["flow"]["mask"])
    warps = {"reference": (reference, nowhere)} | {test: (e["coarse"], e["mask"]) for test, e in edits.items()}
    found, each = {}, {}
    for who, (x, mask) in warps.items():
        error = 1000 * (x - truth).square().mean(1, keepdim=True)
        each[who] = {"distance": lab.distance(x * 2 - 1, truth * 2 - 1).mean((1, 2)),
                     "squared": error.mean((1, 2, 3)), "outside": (error * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))}
        found[who] = {what: mean_error(v) for what, v in each[who].items()}
        found[who]["holes"] = f"{100 * (1 - mask.mean()):.1f} %"
    less = {what: {"surely less": bool(surely_less(each["flow"][what], each["affine"][what])),
                   "difference": mean_error(each["flow"][what].double() - each["affine"][what].double())}
            for what in ("distance", "squared")}
    differ = (edits["flow"]["coarse"] - edits["affine"]["coarse"]).abs().amax(1) > 0.02
    rows = []
    for i in range(min(n, 5)):
        row = [reference[i], truth[i]]
        for test in ("flow", "affine"):
            x, kept = edits[test]["coarse"][i], edits[test]["mask"][i] > 0
            row += [torch.where(kept, x, PINK), x]
        rows.append([to_picture(x * 2 - 1) for x in row])
    heads = ["reference", "target", "warped by flow, holes pink", "as the model is given it",
             "piecewise affine, holes pink", "as the model is given it"]
    lab.save(charts.sheet(rows, heads), "mfx_figure5.png")
    differ = f"{100 * differ.float().mean():.1f} %"
    return Outcome({"n": n, "distance": lab.perceptual[0], "differ": differ, "warps": found, "less": less},
                   [("mfx_figure5.png", "Figure 5: both motion models, the first pairs.")])


# ---------------------------------------------------------------------------------------------------------------------
# Figure 9


@item(
    "mfx_figure9", "Figure 9", chapter=CHAPTER, cost=185, needs=("ablation_weights",),
    claim="Trained on flow alone, the model stays conservative, close to the coarse edit. Trained on piecewise affine "
          "edits alone it hallucinates and loses the identity of objects; trained on both it has the best of each.",
    done="{n} held-out edits of a user's kind through the three models. Squared error against the true re-render, and "
         "squared distance from the coarse edit where shadows and reflections have to change; over that of the model "
         "trained on both, with standard errors by bootstrap over the edits.",
    table=lambda r, t: figure9_table(r), verdict=lambda r, t: figure9_verdict(r),
)
def figure9(lab):
    names = {FLOW: "flow only", AFFINE: "affine only", FULL: "both"}
    found, missing = models(lab, names)
    if missing:
        return Outcome({"n": 0, "missing": missing})
    n = lab.count(120, 16)
    edits = some(the_edits(found[FULL].size, lab.quick), 0, n)
    shown = {called: fixed(found[name], lab.quick, n) for name, called in lab.each(names.items())}
    error = compared(shown, edits["truth"], regions_of(edits), "both")
    moved = compared(shown | {"truth": edits["truth"]}, edits["coarse"], {"shadows and reflections": edits["changed"]},
                     "both")
    rows, verbs = by_verb(edits, edits["reference"], edits["coarse"], *shown.values(), edits["truth"])
    lab.save(charts.sheet(rows, ["reference", "coarse edit", *shown, "truth"], verbs), "mfx_figure9.png")
    return Outcome({"n": n, "missing": [], "error": error, "distance from the coarse edit": moved},
                   [("mfx_figure9.png", "Figure 9, the first edit of each kind.")])


def figure9_table(results):
    if results["missing"]:
        return []
    rows = [["", "flow only", "affine only", "both", "flow only / both", "affine only / both"]]
    for what in ("error", "distance from the coarse edit"):
        for where, f in results[what].items():
            rows.append([f"{what}, {where}", *[f"{f['error'][who]:.5f}" for who in rows[0][1:4]],
                         *[plus_minus(f["ratio"][who]) for who in rows[0][1:3]]])
    return rows


def figure9_verdict(results):
    if results["missing"]:
        return with_missing(results["missing"])
    away = results["distance from the coarse edit"]["shadows and reflections"]["ratio"]["flow only"]
    objects = results["error"]["the edited objects"]["ratio"]["affine only"]
    better = [f"{who} is, {where}" for where, f in results["error"].items() for who, (r, e) in f["ratio"].items()
              if r + 2 * e < 1]
    return judge(
        (away[0] + 2 * away[1] < 1, "trained on flow only, its squared distance from the coarse edit, where that has "
         f"to change, is {plus_minus(away)} times that of the model trained on both"),
        (surely_above(objects), f"trained on affine only, its error on the edited objects is {plus_minus(objects)} "
         "times as large"),
        (not better, "against the truth neither is surely better than both anywhere" if not better else
         f"against the truth some are surely better than both: {'; '.join(better)}"),
    )
