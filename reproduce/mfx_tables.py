"""Magic Fixup's claims on edits as a user makes them: section 4.1, Figure 10; the table of ablations.

The paper shows such edits and asks people. The toy world renders each edit's true result instead.
"""

import functools
import math
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import data
import train
from common.run_state import list_states
from reproduce import charts
from reproduce.lab import HELD_OUT, MFX, NotHere, Outcome, item, judge, percent, plus_minus, progress
from reproduce.metrics import changed_shadows, drawn_error, mean_error, resample
from toy import clips, world
from toy.edits import VERBS, edit_pictures
from video.batches import ShardPairs

STEPS = 25  # of DDIM for a toy, half of the paper's

# ---------------------------------------------------------------------------------------------------------------------
# Edits as a user makes them: move, scale, duplicate or delete one object. And their truth


@functools.lru_cache(maxsize=2)
def make_user_edits(n, size=128, seed=4):
    """n held-out scenes, each with one object edited, as `edit_scenes` gives them."""
    return edit_scenes(world.random_scenes(n, torch.Generator().manual_seed(HELD_OUT + seed), 3), seed, size)


def take(edits, first, count):
    return {name: x[first : first + count] for name, x in edits.items()}


def choose(edits, which):
    """Those of numbers `which`, a list"""
    return {name: [x[i] for i in which] if isinstance(x, list) else x[which] for name, x in edits.items()}


def edit_scenes(scenes, seed, size=128):
    """One edit of one object of each scene -> dict of (n, ...): reference, coarse, truth (3, S, S) in [0, 1], mask
    (1, S, S); changed (S, S) bool: where the truth's shadows and reflections differ from the reference's; object (S, S)
    bool: the edited object, where it truly is afterwards; source (S, S) bool: where it was. And lists: verb, matrix (as
    of toy.edits.Edit); scene and after, the Scenes; slot (n,), the object's number in the latter."""
    generator = torch.Generator().manual_seed(HELD_OUT + seed)
    edited, edits, before, after, coarse, mask = edit_pictures(scenes, generator, size)
    changed = changed_shadows(before.image, after.image, (before.segments > 0) | (after.segments > 0))
    source = before.segments == torch.tensor([e.k + 1 for e in edits])[:, None, None]
    which = torch.tensor([scenes.kind.shape[1] if e.verb == "duplicate" else e.k for e in edits])  # a copy comes last
    return dict(reference=before.image, coarse=coarse, truth=after.image, mask=mask,
                changed=changed, object=after.segments == which[:, None, None] + 1, source=source,
                verb=[e.verb for e in edits], matrix=[e.matrix for e in edits], scene=scenes, after=edited,
                slot=which)


def encode_edit(model, edits):
    return model.encode_edit(edits["reference"] * 2 - 1, edits["coarse"] * 2 - 1, edits["mask"])


def count_steps(model):
    return STEPS if model.size <= 128 else 50


def fix_up(model, edits, steps=None, seeds=(0,)):
    """The edits through Magic Fixup, one sample of each -> (n, 3, S, S) in [0, 1]"""
    steps = steps or count_steps(model)
    outputs = []
    for i in progress(range(0, len(edits["truth"]), 8)):
        edit = encode_edit(model, take(edits, i, 8))
        outputs.append(model.decode(model.sample(*edit, steps=steps, seeds=seeds)).float().cpu())
    return (torch.cat(outputs) / 2 + 0.5).clamp(0, 1)


@functools.lru_cache(maxsize=8)
def fix_user_edits(model, n, seed=4):
    """All n `make_user_edits` through that model, kept for the next item that asks for the same."""
    return fix_up(model, make_user_edits(n, model.size, seed))


def compare(shown, target, regions, base, norm=torch.square):
    """Mean error, squared or absolute, of {who: pictures (n, 3, S, S)} against the target, in {where: (n, S, S) bool},
    over all pictures' pixels together: a large region counts more than a small one.

      ->  {where: {"error": {who: error}, "ratio": {who: [error over base's, its standard error]}}}, by bootstrap over
          the pictures, with the same draws for all
    """
    draws, found = resample(len(target)).double(), {}
    for where, chosen in regions.items():
        each = {who: (norm(x - target).mean(1) * chosen).sum((1, 2)).double() for who, x in shown.items()}  # (n,)
        error, ratio = {}, {}
        for who, e in each.items():
            error[who] = round((e.sum() / chosen.sum()).item(), 6)
            ratio[who] = drawn_error((draws @ e) / (draws @ each[base]), 3)
        found[where] = {"error": error, "ratio": ratio}
    return found


COLLAGE, FIXED = "collage", "Magic Fixup"
SHADOWS, HOLES, OBJECTS, EVERYWHERE = "shadows and reflections", "holes", "the edited objects", "everywhere"


def compare_to_truth(shown, edits, base, norm=torch.square):
    regions = {SHADOWS: edits["changed"], HOLES: edits["mask"][:, 0] == 0, OBJECTS: edits["object"],
               EVERYWHERE: torch.ones_like(edits["changed"])}
    return compare(shown, edits["truth"], regions, base, norm)


def compare_to_coarse(shown, edits, base):
    """How far the outputs, and the truth, are from the coarse edit where shadows and reflections have to change."""
    return compare(shown | {"truth": edits["truth"]}, edits["coarse"], {SHADOWS: edits["changed"]}, base)


def surely_above(ratio):
    """Is a ratio, [value, standard error], above 1 by more than two standard errors? In logarithms, where 3 is as far
    from 1 as a third: of few pictures a ratio's own errors are far larger upwards."""
    value, error = ratio
    return value > 0 and math.log(value) > 2 * error / value


def surely_below(ratio):
    value, error = ratio
    return value == 0 or -math.log(value) > 2 * error / value


def draw_columns(lab, columns, which, name, labels=None):
    """A sheet of {head: pictures (n, 3, S, S) in [0, 1]}: of which edits, a row each"""
    rows = [[x[i] * 2 - 1 for x in columns.values()] for i in which]
    lab.save(charts.sheet(rows, list(columns), labels), name)


def draw_edits(lab, edits, shown, name):
    """The first edit of each kind a row: the reference, {head: pictures} as above, the truth."""
    first = {verb: edits["verb"].index(verb) for verb in VERBS if verb in edits["verb"]}
    columns = {"reference": edits["reference"], **shown, "truth": edits["truth"]}
    draw_columns(lab, columns, first.values(), name, list(first))


@item("magic_fixup", "Section 4.1", chapter=MFX, needs=("mfx_weights",))
def magic_fixup(lab):
    """What the user's edit leaves wrong, shadows and reflections first of all, the model puts right.

    {n} held-out scenes with one object moved, scaled, duplicated or deleted, as a collage and through the model,
    against the true re-render, in {steps} steps: the share of the collage's error that is left. The truth's own round
    trip through the autoencoder is the least error there can be. Absolute errors are small ones in many pixels: what
    was not edited comes back slightly changed.
    """
    model, n = lab.fixup(), lab.count(120, 24)
    edits, output = make_user_edits(n, model.size), fix_user_edits(model, n)
    back = [model.decode(model.encode_image(x * 2 - 1)).float().cpu() for x in edits["truth"].split(32)]
    shown = {COLLAGE: edits["coarse"], "output": output, "round trip": torch.cat(back).clamp(-1, 1) / 2 + 0.5}
    squared, absolute = (compare_to_truth(shown, edits, COLLAGE, norm) for norm in (torch.square, torch.abs))
    table = [["error", *shown, "left"]]
    for name, error in (("squared", squared), ("absolute", absolute)):
        table += [[f"{name}, {where}", *(f"{e:.4f}" for e in f["error"].values()), plus_minus(f["ratio"]["output"])]
                  for where, f in error.items()]
    draw_edits(lab, edits, {"collage": edits["coarse"], "output": output}, "magic_fixup.png")
    left = {where: squared[where]["ratio"]["output"] for where in (EVERYWHERE, SHADOWS)}
    return Outcome(
        {"n": n, "steps": count_steps(model), "squared": squared, "absolute": absolute},
        judge(*[(surely_below(s), f"{where} {percent(s)} of the squared error are left") for where, s in left.items()]),
        table, [("magic_fixup.png", "The first edit that moves, scales, duplicates, deletes: before, as a collage, "
                                    "through the model, the truth.")])


# ---------------------------------------------------------------------------------------------------------------------
# The four models of the ablation. They differ in the motion model that made the coarse edits of their training pairs,
# and one has an embedding of the reference in place of the detail extractor. They see as many steps of as many pairs

FULL, ALONE, FLOW, AFFINE = "both", "alone", "flow", "affine"
TRAINED = {  # by these options of train.py, into folders of these names; the rest of their training is the same
    AFFINE: ("--motion", "affine"), FLOW: ("--motion", "flow"), ALONE: ("--no-cross-reference",), FULL: (),
}
# On clips of half the toy's side, so that four models of a few thousand steps are soon done. bf16: as those that
# docs/results.md is about
TRAINING = ("--steps", "3200", "--precision", "bf16")
CLIPS, SIDE = 3000, 64


def is_trained(folder, name):
    return (folder / name / "model" / "scheduler").is_dir()  # which is written last


def train_ablation(folder):
    """Train what is not there yet, one model after another, on pairs of clips; goes on where it stopped."""
    pairs = make_shards(folder, CLIPS, SIDE, seed=0)
    for name, how in TRAINED.items():
        if not is_trained(folder, name):
            resume = ["--resume"] if list_states(folder / name, "mfx") else []
            train.main(["--out", str(folder / name), "--data", str(pairs), *how, *TRAINING, *resume])
    print(f"{folder}: {', '.join(TRAINED)} are there. Now: python -m reproduce --ablation-weights {folder}")


def load_ablation(lab, *names):
    """-> {name: MagicFixup}. NotHere if any of them is missing."""
    folder = lab.options.ablation_weights
    if missing := [name for name in names if not is_trained(folder, name)]:
        raise NotHere(f"The models {', '.join(missing)} are not in {folder}: python -m reproduce --train-ablation")
    return {name: lab.fixup(folder / name / "model") for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# Table of ablations

TESTS = ("affine", "flow")
CLIPS_HELD_OUT = 901  # their seed: a training's are at most 900
CALLED = {AFFINE: "piecewise affine", FLOW: "flow", ALONE: "both, no cross-reference", FULL: "both (full method)"}
PAPER = {  # LPIPS, each with a standard error of 0.007 (0.008 for the one without cross-reference attention on flow)
    AFFINE: {"affine": 0.231, "flow": 0.220}, FLOW: {"affine": 0.229, "flow": 0.190},
    ALONE: {"affine": 0.327, "flow": 0.269}, FULL: {"affine": 0.231, "flow": 0.196},
}


def make_shards(folder, count, size, seed, pairs=2):
    """`count` clips of the moving toy world, and so many pairs of each by data.py's rules -> the shards' folder. Made
    once."""
    clips.write_clips(folder / "clips", count, size, seed)
    data.main([str(folder / "clips"), "--out", str(folder / "pairs"), "--size", str(size), "--fps", f"{20 / 3:.4f}",
               "--pairs", str(pairs)])
    return folder / "pairs"


def make_held_out_pairs(n, size):
    """At most n pairs of frames, each of a clip of its own that no model has seen, warped by either motion model ->
    {test: dict as of `edit_scenes`, in [0, 1]}. What is in them, and what moves, is the same for both."""
    edits = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_shards(Path(folder), math.ceil(1.2 * n), size, CLIPS_HELD_OUT, pairs=1)
        for test in TESTS:
            whole = next(iter(DataLoader(ShardPairs(pairs, test, shuffle=0, epochs=1), n)))
            edits[test] = {"reference": whole["reference"] / 2 + 0.5, "coarse": whole["coarse"] / 2 + 0.5,
                           "truth": whole["target"] / 2 + 0.5, "mask": whole["mask"]}
    return edits


def compare_warps(edits):
    return percent(((edits["flow"]["coarse"] - edits["affine"]["coarse"]).abs().amax(1) > 0.02).float().mean(), 1)


@item("ablation", "Table in section 4.2", chapter=MFX, needs=("weights", "ablation_weights"))
def ablation(lab):
    """Without cross-reference attention the result is the worst on both tests, and training on flow is the best where
    the test is on flow.

    {n} pairs of frames of held-out clips, {side} pixels a side, the same for both tests, warped by flow or piecewise
    affinely (the two coarse edits differ in {differ} of the pixels), through four models of the same training, {steps}
    steps of DDIM: {distance} between output and target, and squared error in thousandths. The verdict takes the
    differences pair by pair.
    """
    models = load_ablation(lab, *TRAINED)
    edits = make_held_out_pairs(lab.count(256, 8), models[FULL].size)
    n = len(edits["flow"]["truth"])

    def score(x, truth):  # (k, 3, S, S) -> perceptual distance and squared error of each, (k, 2)
        distance = lab.distance(x * 2 - 1, truth * 2 - 1).mean((1, 2))
        return torch.stack([distance, 1000 * (x - truth).square().mean((1, 2, 3))], 1)

    def run(model, edits):  # batch by batch, each of a seed of its own, the same for all models -> (n, 2)
        batches = [(i, take(edits, i, 8)) for i in range(0, len(edits["truth"]), 8)]
        return torch.cat([score(fix_up(model, e, seeds=[i]), e["truth"]) for i, e in batches])

    tests = {}
    for test in progress(TESTS):
        each = {name: run(models[name], edits[test]) for name in TRAINED}
        each["coarse edit"] = score(edits[test]["coarse"], edits[test]["truth"])
        tests[test] = {who: {"distance": mean_error(x[:, 0]), "squared": mean_error(x[:, 1]), "others less this": {
            other: mean_error(each[other][:, 0] - x[:, 0]) for other in TRAINED}} for who, x in each.items()}
    return Outcome(
        {"n": n, "side": models[FULL].size, "differ": compare_warps(edits), "steps": count_steps(models[FULL]),
         "distance": lab.perceptual[0], "tests": tests},
        ablation_verdict(tests), ablation_table(tests, lab.perceptual[0]))


def ablation_table(tests, distance):
    columns = ("LPIPS, paper", f"{distance}, here", "squared error")
    rows = [["trained on", *(f"{test}: {what}" for test in TESTS for what in columns)]]
    for name, called in {"coarse edit": "(the coarse edit itself)", **CALLED}.items():
        rows.append([called])
        for found, test in ((tests[test][name], test) for test in TESTS):
            rows[-1] += [f"{PAPER[name][test]:.3f}" if name in PAPER else "", plus_minus(found["distance"], 4),
                         plus_minus(found["squared"])]
    return rows


def ablation_verdict(tests):
    """The order of the table, one comparison after another, each by the standard error of its differences. What the
    paper's own errors do not separate (training on flow and on both, tested on flow) is not asked for here either."""
    parts = []
    for test, who, sign, what in (*((test, ALONE, 1, "worse") for test in TESTS), ("flow", FLOW, -1, "better")):
        # Is the distance of `who` surely larger (sign 1) or smaller (-1) than that of the other models?
        less = {other: difference for other, difference in tests[test][who]["others less this"].items() if other != who}
        names = {"is": [], "is not": []}
        for other in (name for name in CALLED if name != who):
            d, error = less[other]
            if -sign * d > 2 * error:
                names["is"].append(other)
            elif abs(PAPER[other][test] - PAPER[who][test]) > 0.02 or sign * d > 2 * error:  # 0.02: the paper's errors
                names["is not"].append(other)
        for held, others in names.items():
            values = ", ".join(f"{CALLED[n]} ({-less[n][0]:+.4f} ± {less[n][1]:.4f})" for n in others)
            if others:
                parts.append((held == "is", f"tested on {test}, training on {CALLED[who]} {held} surely {what} than on "
                              f"{values}"))
    return judge(*parts)


@item("cross_reference", "Figure 10", chapter=MFX, needs=("ablation_weights",))
def cross_reference(lab):
    """Without cross-reference attention to the untouched photograph, edits come out worse. Such a model, which sees an
    embedding of the photograph instead, cannot see what was changed, and so stays too close to the coarse edit.

    Two models of the ablation's training, with the detail extractor and without it, on the same {n} held-out edits,
    {side} pixels a side: squared error against the true re-render, and squared distance from the coarse edit where
    shadows and reflections have to change. Ratios with standard errors by bootstrap. (The embedding is the toy
    captioner's, where the paper has CLIP's.) Both are far from the shipped toy, which was trained for longer.
    """
    models, n = load_ablation(lab, FULL, ALONE), lab.count(96, 24)
    edits = make_user_edits(n, models[FULL].size)
    outputs = {"with": fix_user_edits(models[FULL], n), "without": fix_user_edits(models[ALONE], n)}
    error = compare_to_truth({"collage": edits["coarse"]} | outputs, edits, "with")
    moved = compare_to_coarse(outputs, edits, "with")
    shown = {"coarse edit": edits["coarse"], "without the extractor": outputs["without"], "full model": outputs["with"]}
    draw_edits(lab, edits, shown, "cross_reference.png")
    table = [["squared error against the truth", "collage", "with", "without", "without / with"]]
    for where, f in error.items():
        table.append([where, *(f"{e:.5f}" for e in f["error"].values()), plus_minus(f["ratio"]["without"])])
    return Outcome({"n": n, "side": models[FULL].size, "error": error, "distance from the coarse edit": moved},
                   cross_reference_verdict(error, moved[SHADOWS]), table,
                   [("cross_reference.png", "Figure 10, the first edit of each kind.")])


def cross_reference_verdict(error, moved):
    share = {who: percent(moved["error"][who] / moved["error"]["truth"]) for who in ("with", "without")}
    return judge(
        *[(surely_above(f["ratio"]["without"]), f"{where}, without it the error is {plus_minus(f['ratio']['without'])} "
           "times that with it") for where, f in error.items()],
        (surely_below(moved["ratio"]["without"]), f"where {SHADOWS} have to change the output is {share['without']} of "
         f"the truth's squared distance from the coarse edit without it, {share['with']} with it"),
    )
