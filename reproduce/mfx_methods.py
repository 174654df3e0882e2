"""Magic Fixup beside other methods (Figures 1, 2, 7), edits of many kinds (Figure 6), its user study without users."""

import torch

from reproduce import charts, drag, masactrl
from reproduce.dd_methods import run_pix2pix
from reproduce.lab import MFX, Outcome, item, judge, percent, plus_minus, progress
from reproduce.metrics import mean_error
from reproduce.mfx_tables import (
    COLLAGE,
    EVERYWHERE,
    FIXED,
    OBJECTS,
    SHADOWS,
    choose,
    compare_to_truth,
    draw_columns,
    edit_scenes,
    fix_up,
    make_user_edits,
    surely_above,
    take,
)
from toy import world
from toy.captions import caption_scenes


def run_sdedit(lab, image, prompts):
    """(N, 3, S, S) in [0, 1] -> the same, edited at a strength of 0.4: by a constant map, which is SDEdit"""
    return lab.edit(image * 2 - 1, torch.full(image.shape[2:], 0.6), prompts, steps=lab.steps) / 2 + 0.5


def run_masactrl(lab, image, prompts):
    """Both (N, 3, S, S) in [0, 1]"""
    out = []
    for _, batch, wanted in lab.batches(image * 2 - 1, prompts):
        edits, _ = masactrl.edit(lab.model, lab.model.encode_image(batch), wanted, lab.steps)
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
    model, n = lab.fixup(), lab.count(12, 4)
    edits = make_user_edits(n, model.size)
    told = caption_scenes(edits["after"])
    shown = {COLLAGE: edits["coarse"], "MasaCtrl": run_masactrl(lab, edits["reference"], told),
             "SDEdit": run_sdedit(lab, edits["coarse"], told)}
    if lab.instruct:
        orders = [f"{verb} it" for verb in edits["verb"]]
        shown["InstructPix2Pix"] = run_pix2pix(lab, edits["reference"] * 2 - 1, orders, lab.steps) / 2 + 0.5
    shown[FIXED] = fix_up(model, edits)
    error = compare_to_truth(shown, edits, FIXED)
    draw_columns(lab, {"reference": edits["reference"], **shown, "truth": edits["truth"]}, range(min(n, 6)),
                 "mfx_figure2.png", edits["verb"][:6])
    return Outcome(
        {"n": n, "steps": lab.steps, "error": error},
        judge(*say_worse({EVERYWHERE: error[EVERYWHERE]}, [who for who in shown if who not in (FIXED, COLLAGE)])),
        write_errors(error, shown), [("mfx_figure2.png", "The first edits.")])


def choose_verbs(edits, verbs, n):
    """The first n edits of these verbs"""
    return choose(edits, [i for i, verb in enumerate(edits["verb"]) if verb in verbs][:n])


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
    model, n = lab.fixup(), lab.count(12, 3)
    edits = choose_verbs(make_user_edits(8 * n, model.size), ("move",), n)
    after, slot = edits["after"], edits["slot"]
    there, gone = widen(edits["object"], 3), after.kind.clone()
    gone[torch.arange(n), slot] = -1
    empty = after[:]
    empty.kind = gone
    without, told = (caption_scenes(scenes) for scenes in (empty, after))
    # The place that was left is where the collage differs; where the thing goes it is painted over anyway.
    left = widen((edits["reference"] - edits["coarse"]).abs().amax(1) > 0.02, 3)
    cut = lab.inpaint(edits["reference"] * 2 - 1, 1 - left, without, steps=lab.steps)
    again = lab.inpaint(cut, 1 - there, told, steps=lab.steps) / 2 + 0.5
    shown = {COLLAGE: edits["coarse"], "cut": cut / 2 + 0.5, "inserted again": again,
             FIXED: fix_up(model, edits)}
    error = compare_to_truth(shown, edits, FIXED)
    draw_columns(lab, {"reference": edits["reference"], **shown, "truth": edits["truth"]}, range(min(n, 6)),
                 "mfx_figure7.png")
    return Outcome(
        {"n": n, "error": error},
        judge(*say_worse({where: error[where] for where in (OBJECTS, SHADOWS, EVERYWHERE)}, ["inserted again"])),
        write_errors(error, shown), [("mfx_figure7.png", "AnyDoor's protocol with an inpainting model.")])


DRAGGED, HANDLES = "DragDiffusion", 6


def make_handles(source, matrix):
    """Points all over an object (S, S) bool, and where its edit (2, 3) takes them: both (HANDLES, 2), x and y"""
    inside = source.nonzero().flip(1)
    handles = inside[torch.linspace(0, len(inside) - 1, HANDLES + 2).long()[1:-1]].double()
    return handles.float(), (handles @ matrix[:, :2].T + matrix[:, 2]).float()


@item("mfx_figure8", "Figure 8", chapter=MFX, needs=("weights", "mfx_weights"))
def figure8(lab):
    """DragDiffusion edits conservatively, and collapses where much is to move. Magic Fixup does what its collage asks.

    {n} held-out edits that move or scale something. Six points all over it are DragDiffusion's handles, displaced by
    the transform that makes the collage; it may change where the thing was and will be. It is tuned to each picture,
    and drags for at most {drags} steps. Squared error against the true re-render, as a ratio to Magic Fixup's.
    """
    model, n, few = lab.fixup(), lab.count(6, 2), 10 if lab.quick else drag.STEPS
    edits = choose_verbs(make_user_edits(8 * n, model.size), ("move", "scale"), n)
    dragged, went = [], []
    keep, shown = 1 - widen(edits["source"] | edits["object"], 6), caption_scenes(edits["scene"])
    for i in progress(range(n)):
        handles, targets = make_handles(edits["source"][i], edits["matrix"][i])
        z_init = lab.model.encode_image(edits["reference"][i : i + 1].to(lab.device) * 2 - 1)
        z, far = drag.edit(lab.model, z_init, shown[i], keep[i : i + 1], handles, targets, steps=few)
        dragged.append(lab.model.decode(z).clamp(-1, 1).cpu() / 2 + 0.5)
        went.append(1 - far.mean() / (targets - handles).norm(dim=1).mean())
    shown = {COLLAGE: edits["coarse"], DRAGGED: torch.cat(dragged), FIXED: fix_up(model, edits)}
    error, went = compare_to_truth(shown, edits, FIXED), mean_error(went)
    draw_columns(lab, {"reference": edits["reference"], **shown, "truth": edits["truth"]}, range(n), "mfx_figure8.png",
                 edits["verb"])
    return Outcome(
        {"n": n, "drags": few, "error": error, "of the way": went},
        judge(*say_worse({where: error[where] for where in (OBJECTS, EVERYWHERE)}, [DRAGGED]),
              (went[0] < 0.9, f"of their way its handles go {percent(went)}")),
        write_errors(error, shown), [("mfx_figure8.png", "DragDiffusion's handles move as the collage does.")])


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
        output = fix_up(model, edits, seeds=(0, 1))
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


@item("mfx_figure11", "Section 4.1, user study: Figures 11 and 12", chapter=MFX, needs=("weights", "mfx_weights"))
def figure11(lab):
    """Of 27 people all prefer Magic Fixup to SDEdit in 8 of 30 edits, and at least 13 do in each; 89 % of all votes are
    for it.

    A stand-in: nobody was asked. Three samples of {n} held-out edits by either method, SDEdit at 0.4 with a caption.
    For each pair of samples three measures vote for what is nearer to the true re-render: {distance}, squared error,
    and squared error where shadows and reflections change. That makes 27 votes an edit, sorted.
    """
    model, n, samples = lab.fixup(), lab.count(30, 4), 3
    edits = make_user_edits(n, model.size)
    told = caption_scenes(edits["after"])
    ours = fix_up(model, edits, seeds=range(samples)).unflatten(0, (n, samples))
    told, coarse = [t for t in told for _ in range(samples)], edits["coarse"].repeat_interleave(samples, 0)
    theirs = run_sdedit(lab, coarse, told)
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
         ["unanimous edits", "8 of 30", f"{unanimous} of {n}"],
         ["least preferred", "13 of 27", f"{round(27 * votes[order[0]])} of 27"]],
        [("mfx_figure11-chart.png", "Figure 11: votes, edit by edit."),
         ("mfx_figure12.png", "Figure 12: the two edits with most votes, and the one with least.")])
