"""Magic Fixup beside other methods (Figures 1, 2, 7), edits of many kinds (Figure 6), its user study without users."""

import torch

from reproduce import charts, masactrl
from reproduce.dd_methods import run_pix2pix
from reproduce.lab import MFX, Outcome, item, judge, percent, plus_minus, progress
from reproduce.mfx_tables import (
    ABLATION_STEPS,
    EVERYWHERE,
    FIXED,
    OBJECTS,
    SHADOWS,
    compare_to_truth,
    draw_columns,
    edit_scenes,
    fix_up,
    make_user_edits,
    run_sdedit,
    surely_above,
    take,
)
from toy import world
from toy.captions import caption_scenes

COLLAGE = "collage"


def run_masactrl(lab, image, prompts):
    """Both (N, 3, S, S) in [0, 1]"""
    out = []
    for _, batch, wanted in lab.batches(image * 2 - 1, prompts):
        edits, _ = masactrl.edit(lab.model, lab.model.encode_image(batch), wanted, ABLATION_STEPS)
        out.append(lab.model.decode(edits).clamp(-1, 1).cpu() / 2 + 0.5)
    return torch.cat(out)


def say_worse(error, others):
    """Parts of a verdict: is the error of each of the others surely larger than Magic Fixup's, and where?"""
    return [(surely_above(f["ratio"][who]), f"{where}, {who} has {plus_minus(f['ratio'][who])} times its error")
            for where, f in error.items() for who in others]


def write_errors(error, shown):
    return [["squared error, times Magic Fixup's", *shown],
            *([where, *(plus_minus(f["ratio"][who]) for who in shown)] for where, f in error.items())]


@item("mfx_figure2", "Figures 1 and 2", chapter=MFX, needs=("weights", "mfx_weights", "instruct_weights"))
def figure2(lab):
    """Edits by text cannot do what a collage asks for: they change the whole picture's appearance, or are unrealistic.
    From the collage Magic Fixup makes what is truly there, where SDEdit does not.

    {n} held-out edits in {steps} steps. MasaCtrl is told the edited scene in words, SDEdit at 0.4 has the collage too;
    InstructPix2Pix only where there are weights (--instruct-weights). Squared error against the true re-render, as a
    ratio to Magic Fixup's.
    """
    model, n = lab.fixup(), lab.count(6, 4)
    edits = make_user_edits(n, model.size)
    told = caption_scenes(edits["after"])
    shown = {COLLAGE: edits["coarse"], "MasaCtrl": run_masactrl(lab, edits["reference"], told),
             "SDEdit": run_sdedit(lab, edits["coarse"], told, ABLATION_STEPS)}
    if lab.instruct:
        orders = [f"{verb} it" for verb in edits["verb"]]
        shown["InstructPix2Pix"] = run_pix2pix(lab, edits["reference"] * 2 - 1, orders, ABLATION_STEPS) / 2 + 0.5
    shown[FIXED] = fix_up(model, edits, ABLATION_STEPS)
    error = compare_to_truth(shown, edits, FIXED)
    draw_columns(lab, {"reference": edits["reference"], **shown, "truth": edits["truth"]}, range(min(n, 6)),
                 "mfx_figure2.png", edits["verb"][:6])
    return Outcome(
        {"n": n, "steps": ABLATION_STEPS, "error": error},
        judge(*say_worse({EVERYWHERE: error[EVERYWHERE]}, [who for who in shown if who not in (FIXED, COLLAGE)])),
        write_errors(error, shown), [("mfx_figure2.png", "The first edits.")])


def widen(region, pixels):
    """(n, S, S) bool -> (n, 1, S, S) float, larger by so many pixels"""
    return torch.nn.functional.max_pool2d(region[:, None].float(), 2 * pixels + 1, 1, pixels)


@item("mfx_figure7", "Figure 7", chapter=MFX, needs=("weights", "mfx_weights", "inpainting_weights"))
def figure7(lab):
    """Cut, inpaint and insert again, AnyDoor's way to move a thing: its identity is not kept, its light and shadow are
    wrong, and the rims of the masks are seen. Magic Fixup keeps it, and puts its shadow right.

    AnyDoor's protocol alone, not its network, whose weights are not to be had: the toy's inpainting model empties the
    place, told what else is in the scene, and then paints the thing at its new place, told what it is. {n} held-out
    edits that move something: squared error against the true re-render, as a ratio to Magic Fixup's.
    """
    model, n = lab.fixup(), lab.count(6, 3)
    edits = make_user_edits(8 * n, model.size)
    moved = [i for i, verb in enumerate(edits["verb"]) if verb == "move"][:n]
    edits = {name: [x[i] for i in moved] if isinstance(x, list) else x[moved] for name, x in edits.items()}
    n, after, slot = len(moved), edits["after"], edits["slot"]
    there, gone = widen(edits["object"], 3), after.kind.clone()
    gone[torch.arange(n), slot] = -1
    empty = after[:]
    empty.kind = gone
    without, told = (caption_scenes(scenes) for scenes in (empty, after))
    # The place that was left is where the collage differs; where the thing goes it is painted over anyway.
    left = widen((edits["reference"] - edits["coarse"]).abs().amax(1) > 0.02, 3)
    cut = lab.inpaint(edits["reference"] * 2 - 1, 1 - left, without, steps=ABLATION_STEPS)
    again = lab.inpaint(cut, 1 - there, told, steps=ABLATION_STEPS) / 2 + 0.5
    shown = {COLLAGE: edits["coarse"], "cut": cut / 2 + 0.5, "inserted again": again,
             FIXED: fix_up(model, edits, ABLATION_STEPS)}
    error = compare_to_truth(shown, edits, FIXED)
    draw_columns(lab, {"reference": edits["reference"], **shown, "truth": edits["truth"]}, range(n), "mfx_figure7.png")
    return Outcome(
        {"n": n, "error": error},
        judge(*say_worse({where: error[where] for where in (OBJECTS, SHADOWS, EVERYWHERE)}, ["inserted again"])),
        write_errors(error, shown), [("mfx_figure7.png", "AnyDoor's protocol with an inpainting model.")])


# ---------------------------------------------------------------------------------------------------------------------
# Figure 6

SCENES = {  # what is edited: ground, time, how blurred what is out of focus is, verb
    "a reflection goes": ("water", "noon", 0.0, "delete"), "a reflection comes": ("water", "sunset", 0.0, "duplicate"),
    "a shadow moves": ("sand", "sunset", 0.0, "move"), "a shadow grows": ("snow", "noon", 0.0, "scale"),
    "into focus": ("grass", "noon", 0.08, "move"), "at night": ("grass", "night", 0.0, "move"),
}


@item("mfx_gallery", "Figure 6", chapter=MFX, needs=("mfx_weights",))
def gallery(lab):
    """Edits of many kinds come out whole: shadows and reflections go along, come and vanish, what is moved is as sharp
    as its new place.

    One held-out edit of each kind, two samples of each: the squared error that is left of the collage's where shadows
    and reflections change, or for the focus, on the edited object.
    """
    model, rows, left, labels = lab.fixup(), [], {}, []
    for name, (ground, time, aperture, verb) in progress(SCENES.items()):
        scenes = lab.scenes(24, 66, objects=2)
        scenes.ground[:], scenes.time[:] = world.GROUNDS.index(ground), world.TIMES.index(time)
        scenes.aperture[:], scenes.focus[:] = aperture, 0.4
        edits = edit_scenes(scenes, 66, model.size)
        edits = take(edits, edits["verb"].index(verb), 1)
        output = fix_up(model, edits, ABLATION_STEPS, seeds=(0, 1))
        region = (edits["object"] if aperture else edits["changed"])[0]
        results = (*edits["coarse"], *output)
        before, *after = (((x - edits["truth"][0]).square().mean(0) * region).sum() for x in results)
        left[name] = [round((x / before).item(), 3) for x in after]
        rows.append([x * 2 - 1 for x in (edits["reference"][0], edits["coarse"][0], *output, edits["truth"][0])])
        labels.append(name)
    lab.save(charts.sheet(rows, ["reference", "collage", "a sample", "another", "truth"], labels), "mfx_gallery.png")
    better = [name for name, values in left.items() if max(values) < 1]
    return Outcome(
        {"n": len(SCENES), "left": left},
        judge(*[(name in better, f"{name}: {percent(values[0])} and {percent(values[1])} of the error are left")
                for name, values in left.items()]),
        [["", "one sample", "another"], *([name, *map(percent, values)] for name, values in left.items())],
        [("mfx_gallery.png", "A row for each kind of edit.")])


# ---------------------------------------------------------------------------------------------------------------------
# The user study, edit by edit: Figures 11 and 12


@item("mfx_figure11", "Figures 11 and 12", chapter=MFX, needs=("weights", "mfx_weights"))
def figure11(lab):
    """Of 27 people all prefer Magic Fixup to SDEdit in 8 of 30 edits, and at least 13 do in each; 89 % of all votes are
    for it.

    A stand-in: nobody was asked. Three samples of {n} held-out edits by either method, SDEdit at 0.4 with a caption.
    For each pair of samples three measures vote for what is nearer to the true re-render: {distance}, squared error,
    and squared error where shadows and reflections change. That makes 27 votes an edit, sorted.
    """
    model, n, samples = lab.fixup(), lab.count(10, 4), 3
    edits = make_user_edits(n, model.size)
    told = caption_scenes(edits["after"])
    ours = fix_up(model, edits, ABLATION_STEPS, seeds=range(samples)).unflatten(0, (n, samples))
    told, coarse = [t for t in told for _ in range(samples)], edits["coarse"].repeat_interleave(samples, 0)
    theirs = run_sdedit(lab, coarse, told, ABLATION_STEPS)
    theirs, votes = theirs.unflatten(0, (n, samples)), []
    for i in range(n):
        truth, changed = edits["truth"][i : i + 1].expand(samples, -1, -1, -1), edits["changed"][i]
        measures = [lambda x, y: lab.distance(x * 2 - 1, y * 2 - 1).mean((1, 2)),
                    lambda x, y: (x - y).square().mean((1, 2, 3)),
                    lambda x, y, where=changed: ((x - y).square().mean(1) * where).sum((1, 2))]
        won = [m(ours[i], truth)[:, None] < m(theirs[i], truth) for m in measures]
        votes.append(torch.stack(won).float().mean().item())
    order = sorted(range(n), key=lambda i: votes[i])
    shares = [100 * votes[i] for i in order]
    lab.save(charts.chart({"measured": (list(range(1, n + 1)), shares)}, "edit, sorted", "% of votes for Magic Fixup"),
             "mfx_figure11-chart.png")
    picked = {f"{round(27 * votes[i])} of 27": i for i in (order[-1], order[-2], order[0])}
    draw_columns(lab, {"reference": edits["reference"], COLLAGE: edits["coarse"], "SDEdit": theirs[:, 0],
                       FIXED: ours[:, 0], "truth": edits["truth"]}, picked.values(), "mfx_figure12.png", list(picked))
    all_votes, unanimous = sum(votes) / n, sum(v == 1 for v in votes)
    return Outcome(
        {"n": n, "distance": lab.perceptual[0], "votes": [round(27 * votes[i]) for i in order], "share": all_votes},
        judge((all_votes > 0.5, f"{percent(all_votes)} of the votes are for Magic Fixup"),
              (unanimous > 0, f"{unanimous} of {n} edits are unanimous"),
              (min(shares) >= 100 * 13 / 27, f"the least preferred edit has {shares[0]:.0f} %")),
        [["", "paper", "here"], ["votes for Magic Fixup", "89 %", percent(all_votes)],
         ["unanimous edits", "8 of 30", f"{unanimous} of {n}"], ["least preferred", "13 of 27", f"{shares[0]:.0f} %"]],
        [("mfx_figure11-chart.png", "Figure 11: votes, edit by edit."),
         ("mfx_figure12.png", "Figure 12: the two edits with most votes, and the one with least.")])
