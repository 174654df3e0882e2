"""Magic Fixup's claims on edits as a user makes them, at toy size: section 4.1, Figure 10, the user study.

The paper shows such edits and asks people. The toy world renders each edit's true result instead. The ablation table is
in mfx_ablation.py, the other figures in mfx_figures.py.
"""

import functools
from pathlib import Path

import torch

import collage
import diffdiff
import mfx
from common import pictures
from reproduce import charts
from reproduce.lab import (
    HELD_OUT,
    OPEN,
    TRUE,
    Outcome,
    item,
    judge,
    mean_error,
    plus_minus,
    quick,
    resampled,
    to_picture,
)
from reproduce.toy import scenes_of
from toy import world as toyworld
from toy.edits import VERBS, random_edits, to_collage

CHAPTER = "Magic Fixup"

# ---------------------------------------------------------------------------------------------------------------------
# The four models of the paper's ablation, by the names of their folders in --ablation-weights

FULL, ALONE, FLOW, AFFINE = "both", "alone", "flow", "affine"
TRAINED = {  # by these options of train.py; the rest of their training is the same
    AFFINE: ("--motion", "affine"), FLOW: ("--motion", "flow"), ALONE: ("--no-cross-reference",), FULL: (),
}


def place_of(folder, name):
    """Where in that folder this model is: as in weights/, or as train.py leaves it. None if it is not there, or not
    whole."""
    places = Path(folder) / name / "model", Path(folder) / name
    return next((p for p in places if (p / "scheduler").is_dir()), None)


@functools.lru_cache(maxsize=8)
def loaded(path, dtype, device):
    return quick(mfx.load(path, dtype, device))


def models(lab, names):
    """-> {name: MagicFixup} of those that are there, [names of those that are not]"""
    places = {name: place_of(lab.options.ablation_weights, name) for name in names}
    there = {name: loaded(path.resolve(), lab.dtype, lab.device) for name, path in places.items() if path}
    return there, [name for name in names if name not in there]


def with_missing(missing, *parts):
    """A verdict as `judge` gives it on the parts of a claim that could be measured, unless models were missing."""
    verdict, why = judge(*parts) if parts else (OPEN, "")
    if missing:
        commands = ", ".join(" ".join(["python train.py", *TRAINED[name], "--out", f"runs/ablation/{name}"])
                             for name in missing)
        why = (f"{why} Not there: {', '.join(missing)}. Trained by: {commands}; or all four by: "
               "python mfx_ablation.py. Then: --ablation-weights runs/ablation.").strip()
    return OPEN if missing else verdict, why


# ---------------------------------------------------------------------------------------------------------------------
# Edits as a user makes them: move, scale, duplicate or delete one object. And their truth


def user_edits(n, seed=4, size=128):
    """n held-out scenes, each with one object edited, as `edits_of` gives them."""
    return edits_of(scenes_of(seed, n), seed, size)


def some(edits, first, count):
    return {name: x[first : first + count] for name, x in edits.items()}


def edits_of(scenes, seed, size=128):
    """One edit of one object of each scene -> dict of (n, ...): reference, coarse, truth (3, S, S) in [0, 1], mask
    (1, S, S); changed (S, S) bool: where the truth's shadows and reflections differ from the reference's; object (S, S)
    bool: the edited object, where it truly is afterwards. And verb, a list; after, the edited Scene."""
    edited, edits = random_edits(scenes, torch.Generator().manual_seed(HELD_OUT + seed), size)
    before, after = toyworld.render(scenes, size), toyworld.render(edited, size)
    coarse, mask = [], []
    for i, image in enumerate((before.image * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        edit = collage.composite(image, to_collage(edited[i : i + 1], edits[i], before.segments[i]))
        holes = edit[..., 3] == 0
        coarse.append(torch.from_numpy(collage.fill_holes(edit[..., :3], holes)).permute(2, 0, 1) / 255)
        mask.append(torch.from_numpy(~holes)[None].float())
    changed = mfx.changed_shadows(before.image, after.image, (before.segments > 0) | (after.segments > 0))
    which = torch.tensor([scenes.kind.shape[1] if e.verb == "duplicate" else e.k for e in edits])  # a copy comes last
    return dict(reference=before.image, coarse=torch.stack(coarse), truth=after.image, mask=torch.stack(mask),
                changed=changed, object=after.segments == which[:, None, None] + 1, verb=[e.verb for e in edits],
                after=edited)


def fix_up(model, edits, steps=50, seeds=(0,)):
    """The edits through Magic Fixup -> (n, 3, S, S) in [0, 1], one sample of each."""
    outputs = []
    for i in range(0, len(edits["truth"]), 8):
        reference, coarse = (model.encode_image(edits[n][i : i + 8] * 2 - 1) for n in ("reference", "coarse"))
        mask = diffdiff.down_sample(edits["mask"][i : i + 8], coarse.shape[-2:])
        z = model.sample(reference, coarse, mask, steps=steps, seeds=seeds)
        outputs.append(model.decode(z).float().cpu())
    return (torch.cat(outputs) / 2 + 0.5).clamp(0, 1)


@functools.lru_cache(maxsize=1)
def the_edits(size, quick):
    """Those that all items share."""
    return user_edits(24 if quick else 120, size=size)


@functools.lru_cache(maxsize=256)
def fixed_eight(model, quick, first):
    """Kept while the program runs, for the next item that asks for the same."""
    return fix_up(model, some(the_edits(model.size, quick), first, 8))


def fixed(model, quick, count, each=iter):
    """The first `count` of `the_edits` through that model -> (count, 3, S, S) in [0, 1]"""
    return torch.cat([fixed_eight(model, quick, i) for i in each(range(0, count, 8))])


def compared(shown, target, regions, base):
    """Mean squared error of {who: pictures (n, 3, S, S)} against the target, in {where: (n, S, S) bool}, over all
    pictures' pixels together: a large region counts more than a small one.

      ->  {where: {"error": {who: error}, "ratio": {who: [error over base's, its standard error]}}}, by bootstrap over
          the pictures, with the same draws for all
    """
    draws, found = resampled(len(target)).double(), {}
    for where, chosen in regions.items():
        each = {who: ((x - target).square().mean(1) * chosen).sum((1, 2)).double() for who, x in shown.items()}  # (n,)
        error, ratio = {}, {}
        for who, e in each.items():
            drawn = (draws @ e) / (draws @ each[base])
            error[who] = round((e.sum() / chosen.sum()).item(), 6)
            ratio[who] = [round((e.sum() / each[base].sum()).item(), 3), round(drawn.std().item(), 3)]
        found[where] = {"error": error, "ratio": ratio}
    return found


def regions_of(edits):
    return {"shadows and reflections": edits["changed"], "holes": edits["mask"][:, 0] == 0,
            "the edited objects": edits["object"], "everywhere": torch.ones_like(edits["changed"])}


def by_verb(edits, *columns):
    """Rows of pictures for a sheet, the first edit of each kind; columns (n, 3, S, S) in [0, 1]"""
    first = [edits["verb"].index(verb) for verb in VERBS if verb in edits["verb"]]
    return [[to_picture(x[i] * 2 - 1) for x in columns] for i in first], [edits["verb"][i] for i in first]


# ---------------------------------------------------------------------------------------------------------------------
# The shadow share


def magic_fixup(model, quick, out, each=iter):
    """Mean absolute and squared error against the true re-render: of the coarse edit and of the output, over the whole
    picture and where shadows and reflections change. And the share of the coarse edit's error that the model removes,
    with its standard error, by bootstrap over the edits.

    The truth's own round trip through the autoencoder is the least error that any output can have.
    """
    edits = the_edits(model.size, quick)
    coarse, truth = edits["coarse"], edits["truth"]
    output = fixed(model, quick, len(truth), each)
    back = torch.cat([model.decode(model.encode_image(x * 2 - 1)).float().cpu() for x in truth.split(32)])
    back = back.clamp(-1, 1) / 2 + 0.5
    result, draws = {}, resampled(len(truth))
    for where, region in (("everywhere", torch.ones_like(edits["changed"])),
                          ("shadows and reflections", edits["changed"])):
        result[where] = {}
        for name, norm in (("absolute", torch.abs), ("squared", torch.square)):
            before, after, removed = mfx.shadow_share(coarse, output, truth, region, norm)
            least = norm(back - truth).mean(1)[region].mean().item()
            errors = {"coarse edit": before, "output": after, "round trip": least}
            drawn = [draws @ (norm(x - truth).mean(1) * region).sum((1, 2)) for x in (output, coarse)]
            result[where][name] = {who: round(e, 5) for who, e in errors.items()} | {
                "removed": [round(removed, 3), round((drawn[0] / drawn[1]).std().item(), 3)]}
    rows = (edits["reference"], coarse, output, truth)  # of the sheet; a column for each verb
    first = [edits["verb"].index(verb) for verb in VERBS]
    columns = [pictures.tensor_to_picture(torch.cat([x[i] for x in rows], 1)) for i in first]
    pictures.save_picture(pictures.labelled(columns, VERBS), out / "magic_fixup.png", {})
    return result


@item(
    "magic_fixup", "Section 4.1", chapter=CHAPTER, cost=65, needs=("mfx_weights",),
    claim="What the user's edit leaves wrong, shadows and reflections first of all, the model puts right.",
    done="Held-out scenes with one object moved, scaled, duplicated or deleted, as a collage and through the model, "
         "against the true re-render. The truth's own round trip through the autoencoder is the least error there can "
         "be.",
    table=lambda r, t: [["error", "collage", "output", "round trip", "removed"]] + [
        [f"{norm}, {where}", *[f"{e[who]:.4f}" for who in ("coarse edit", "output", "round trip")],
         percent(e["removed"])] for where, norms in r.items() for norm, e in norms.items()],
    verdict=lambda r, t: judge(*[
        (surely_above(share := e["squared"]["removed"], 0), f"{where} {percent(share)} of the squared error goes")
        for where, e in r.items()]),
)
def run_magic_fixup(lab):
    model = loaded(Path(lab.options.mfx_weights).resolve(), lab.dtype, lab.device)
    return Outcome(magic_fixup(model, lab.quick, lab.out, lab.each),
                   [("magic_fixup.png", "From above: reference, collage, output, truth.")])


# ---------------------------------------------------------------------------------------------------------------------
# Figure 10: without the extractor


@item(
    "cross_reference", "Figure 10", chapter=CHAPTER, cost=30, needs=("ablation_weights",),
    claim="Without cross-reference attention to the untouched photograph, edits come out worse. Such a model cannot "
          "see what was changed, and so stays too close to the coarse edit.",
    done="The toy, and one of the same training without its detail extractor, on the same {n} held-out edits: squared "
         "error against the true re-render, and the squared distance from the coarse edit where shadows and "
         "reflections have to change. The last column is the value without over that with, and its standard error, by "
         "bootstrap over the edits. (The paper's model without it sees a CLIP embedding of the photograph instead; "
         "ours sees nothing of it.)",
    table=lambda r, t: ratio_table(r, "collage", "with", "without"),
    verdict=lambda r, t: cross_reference_verdict(r),
)
def cross_reference(lab):
    found, missing = models(lab, (FULL, ALONE))
    if missing:
        return Outcome({"n": 0, "missing": missing})
    edits = the_edits(found[FULL].size, lab.quick)
    n = len(edits["truth"])
    full, alone = (fixed(found[name], lab.quick, n) for name in lab.each((FULL, ALONE)))
    shown = {"collage": edits["coarse"], "with": full, "without": alone}
    error = compared(shown, edits["truth"], regions_of(edits), "with")
    moved = compared({"with": full, "without": alone, "truth": edits["truth"]}, edits["coarse"],
                     {"shadows and reflections": edits["changed"]}, "with")
    rows, verbs = by_verb(edits, edits["reference"], edits["coarse"], alone, full, edits["truth"])
    heads = ["reference", "coarse edit", "without the extractor", "full model", "truth"]
    lab.save(charts.sheet(rows, heads, verbs), "cross_reference.png")
    return Outcome({"n": n, "missing": [], "error": error, "distance from the coarse edit": moved},
                   [("cross_reference.png", "Figure 10, the first edit of each kind.")])


def ratio_table(results, *columns):
    """Errors in each region, the last column over the one before"""
    if results["missing"]:
        return []
    *_, base, who = columns
    rows = [["squared error against the truth", *columns, f"{who} / {base}"]]
    for where, found in results["error"].items():
        rows.append([where, *[f"{found['error'][c]:.5f}" for c in columns], plus_minus(found["ratio"][who])])
    return rows


def cross_reference_verdict(results):
    if results["missing"]:
        return with_missing(results["missing"])
    moved = results["distance from the coarse edit"]["shadows and reflections"]
    (away, error), truth = moved["ratio"]["without"], moved["error"]["truth"]
    shares = {who: f"{100 * moved['error'][who] / truth:.0f} %" for who in ("with", "without")}
    verdict, why = judge(
        *[(surely_above(f["ratio"]["without"]), f"{where}, {plus_minus(f['ratio']['without'])} times the error without "
           "it") for where, f in results["error"].items()],
        (away + 2 * error < 1, f"where shadows and reflections have to change the output is {shares['without']} of the "
         f"truth's squared distance from the coarse edit without it, {shares['with']} with it"),
    )
    objects = results["error"]["the edited objects"]["error"]
    if verdict != TRUE and objects["collage"] < objects["with"]:
        why += (" Why: the coarse edit itself shows the edited objects better than the output does (squared error "
                f"{objects['collage']:.4f} and {objects['with']:.4f}). Little of them is left to look up in the "
                "photograph.")
    return verdict, why


def percent(share):
    """[share of 1, standard error] -> text"""
    return f"{100 * share[0]:.0f} ± {100 * share[1]:.0f} %"


def surely_above(ratio, one=1.0):
    """Is a ratio, [value, standard error], above one by more than two standard errors?"""
    return ratio[0] - 2 * ratio[1] > one


# ---------------------------------------------------------------------------------------------------------------------
# SDEdit at 0.4, the user study's other side

STRENGTH = 0.4
CAPTIONED, SILENT, FIXED = "SDEdit, captioned", "SDEdit, no caption", "Magic Fixup"


def caption(scenes, i):
    """Scene i in words, as the base model has learned them: all its objects from left to right, ground and time. In the
    paper BLIP looks at the picture."""
    order = [k for k in scenes.x[i].argsort().tolist() if scenes.kind[i, k] >= 0]
    things = [f"a {toyworld.COLOURS[scenes.colour[i, k]]} {toyworld.KINDS[scenes.kind[i, k]]}" for k in order]
    things = " and ".join(filter(None, [", ".join(things[:-1]), *things[-1:]]))
    where = f"{toyworld.GROUNDS[scenes.ground[i]]} at {toyworld.TIMES[scenes.time[i]]}"
    return f"{things} on {where}" if things else where


@item(
    "sdedit", "Section 4.1, user study", chapter=CHAPTER, cost=45, needs=("weights", "mfx_weights"),
    claim="Magic Fixup's edits are preferred to SDEdit's at a strength of 0.4, by 722 of 810 votes. On one of 30 "
          "edits, a painting, it was about even.",
    done="{n} held-out edits through both; SDEdit with the base model, 50 steps, at a guidance of 7.5 with the edited "
         "scene's caption, and of 1 without one. Instead of 27 people the true re-render votes, for what is nearest to "
         "it of Magic Fixup and both SDEdits. By squared error, and by {distance}.",
    table=lambda r, t: sdedit_table(r),
    verdict=lambda r, t: judge(
        *[(f["votes"][0] - 2 * f["votes"][1] > 0.5, f"by {what} Magic Fixup is nearest in "
           f"{100 * f['votes'][0]:.0f} ± {100 * f['votes'][1]:.0f} % of the edits (the paper's votes: 89 %)")
          for what, f in (("squared error", r["squared"]), (r["distance"], r["perceptual"]))],
        *[(f["ratio"][FIXED][0] + 2 * f["ratio"][FIXED][1] < 1, f"{where}, its squared error is "
           f"{plus_minus(f['ratio'][FIXED])} times that of {r['base']}") for where, f in r["error"].items()],
    ),
)
def sdedit(lab):
    n, model = lab.count(120, 16), loaded(Path(lab.options.mfx_weights).resolve(), lab.dtype, lab.device)
    edits = some(the_edits(model.size, lab.quick), 0, n)
    truth = edits["truth"]
    captions = [caption(edits["after"], i) for i in range(n)]

    def edited(prompts, guidance):
        def how(denoise, z_init, mu, sampler, noise, step_noise):
            return diffdiff.sdedit(denoise, z_init, STRENGTH, sampler, noise, step_noise)

        x = edits["coarse"] * 2 - 1
        return lab.edit(x, x[0, 0], prompts, steps=50, guidance=guidance, how=how) / 2 + 0.5

    jobs = {SILENT: lambda: edited([""] * n, 1.0), CAPTIONED: lambda: edited(captions, 7.5),
            FIXED: lambda: fixed(model, lab.quick, n)}
    shown = {"collage": edits["coarse"]} | {who: jobs[who]() for who in lab.each(jobs)}
    apart = {who: lab.distance(x * 2 - 1, truth * 2 - 1).mean((1, 2)) for who, x in shown.items()}
    squared = {who: (x - truth).square().mean((1, 2, 3)) for who, x in shown.items()}
    base = min((SILENT, CAPTIONED), key=lambda who: squared[who].mean())
    rows, verbs = by_verb(edits, edits["reference"], *shown.values(), truth)
    lab.save(charts.sheet(rows, ["reference", "coarse edit", *jobs, "truth"], verbs), "sdedit.png")
    return Outcome({
        "n": n, "distance": lab.perceptual[0], "base": base, "error": compared(shown, truth, regions_of(edits), base),
        "squared": {"votes": votes(squared)},
        "perceptual": {"votes": votes(apart)} | {who: mean_error(x) for who, x in apart.items()},
    }, [("sdedit.png", f"The first edit of each kind, SDEdit at a strength of {STRENGTH}.")])


def votes(apart):
    """{who: (n,)} -> in what share of edits Magic Fixup is nearer than both SDEdits, and that share's standard error,
    as of four edits more, two of them won (Agresti & Coull 1998: otherwise a share of 1 had none)."""
    won, n = (apart[FIXED] < torch.minimum(apart[SILENT], apart[CAPTIONED])).sum().item(), len(apart[FIXED])
    p = (won + 2) / (n + 4)
    return [round(won / n, 3), round((p * (1 - p) / (n + 4)) ** 0.5, 3)]


def sdedit_table(results):
    who = ("collage", SILENT, CAPTIONED, FIXED)
    rows = [["", *who, f"{FIXED} / {results['base']}"]]
    for where, f in results["error"].items():
        rows.append([f"squared error, {where}", *[f"{f['error'][w]:.5f}" for w in who], plus_minus(f["ratio"][FIXED])])
    return rows + [[results["distance"], *[plus_minus(results["perceptual"][w], 3) for w in who], ""]]
