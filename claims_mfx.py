"""Magic Fixup's claims, at toy size."""

from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import collage
import diffdiff
import mfx
import pictures
import toyworld
from claims import HELD_OUT, Outcome, item, judge, plus_minus, resampled
from claims_toy import scenes_of

CHAPTER = "Magic Fixup"
ALONE = Path(__file__).parent / "weights" / "toy-mfx-alone"  # the toy, trained in the same way without its extractor

# ---------------------------------------------------------------------------------------------------------------------
# Magic Fixup on edits as a user makes them: move, scale, duplicate or delete one object, then compare with the truth


def user_edits(n, seed=4):
    """n held-out scenes, each with one object edited -> dict of (n, ...): reference, coarse, truth (3, H, W) in [0, 1],
    mask (1, H, W), and changed (H, W) bool: where the truth's shadows and reflections differ from the reference's."""
    scenes = scenes_of(seed, n)
    edited, edits = toyworld.random_edits(scenes, torch.Generator().manual_seed(HELD_OUT + seed))
    before, after = toyworld.render(scenes), toyworld.render(edited)
    coarse, mask = [], []
    for i, image in enumerate((before.image * 255).round().byte().permute(0, 2, 3, 1).numpy()):
        edit = collage.composite(image, toyworld.pieces(edited[i : i + 1], edits[i], before.segments[i]))
        holes = edit[..., 3] == 0
        coarse.append(torch.from_numpy(collage.fill_holes(edit[..., :3], holes)).permute(2, 0, 1) / 255)
        mask.append(torch.from_numpy(~holes)[None].float())
    # Nothing but objects, shadows and reflections changes in an edit. Off the objects (and their smoothed edges) before
    # and after, what differs is therefore shadow or reflection.
    on_object = ((before.segments > 0) | (after.segments > 0))[:, None].float()
    differs = (after.image - before.image).abs().amax(1) > 0.02
    changed = differs & (F.max_pool2d(on_object, 3, 1, 1)[:, 0] == 0)
    return dict(reference=before.image, coarse=torch.stack(coarse), truth=after.image, mask=torch.stack(mask),
                changed=changed, verb=[e.verb for e in edits])


def fix_up(model, edits, steps=50):
    """The edits through Magic Fixup -> (n, 3, H, W) in [0, 1], one sample of each with seed 0."""
    outputs = []
    for i in tqdm(range(0, len(edits["truth"]), 8), desc="Magic Fixup", leave=False):
        reference, coarse = (model.encode_image(edits[n][i : i + 8] * 2 - 1) for n in ("reference", "coarse"))
        mask = diffdiff.down_sample(edits["mask"][i : i + 8], coarse.shape[-2:])
        outputs.append(model.decode(model.sample(reference, coarse, mask, steps=steps)))
    return (torch.cat(outputs) / 2 + 0.5).clamp(0, 1)


def magic_fixup(model, quick, out):
    """Mean absolute and squared error against the true re-render: of the coarse edit and of the output, over the whole
    picture and where shadows and reflections change. And the share of the coarse edit's error that the model removes.

    The truth's own round trip through the autoencoder is the least error that any output can have.
    """
    edits = user_edits(24 if quick else 240)
    truth, output = edits["truth"], fix_up(model, edits)
    back = torch.cat([model.decode(model.encode_image(x * 2 - 1)) for x in truth.split(32)]).clamp(-1, 1) / 2 + 0.5
    result = {}
    changed = edits["changed"]
    for where, chosen in (("everywhere", torch.ones_like(changed)), ("shadows and reflections", changed)):
        result[where] = {}
        for name, norm in (("absolute", torch.abs), ("squared", torch.square)):
            error = {who: norm(x - truth).mean(1)[chosen].mean().item()
                     for who, x in (("coarse edit", edits["coarse"]), ("output", output), ("round trip", back))}
            result[where][name] = {who: round(e, 5) for who, e in error.items()}
            result[where][name]["removed"] = round(1 - error["output"] / error["coarse edit"], 3)
    rows = (edits["reference"], edits["coarse"], output, truth)  # of the sheet; a column for each verb
    first = [edits["verb"].index(verb) for verb in toyworld.VERBS]
    columns = [pictures.tensor_to_picture(torch.cat([x[i] for x in rows], 1)) for i in first]
    pictures.save_picture(pictures.labelled(columns, toyworld.VERBS), out / "magic_fixup.png", {})
    return result


@item(
    "magic_fixup", "Section 4, on the toy world", chapter=CHAPTER, cost=600, needs=("mfx_weights",),
    claim="What the user's edit leaves wrong, shadows and reflections first of all, the model puts right.",
    done="Held-out scenes with one object moved, scaled, duplicated or deleted, as a collage and through the model, "
         "against the true re-render. The truth's own round trip through the autoencoder is the least error there can "
         "be.",
    table=lambda r, t: [["error", "collage", "output", "round trip", "removed"]] + [
        [f"{norm}, {where}", *[f"{e[who]:.4f}" for who in ("coarse edit", "output", "round trip")],
         f"{100 * e['removed']:.0f} %"] for where, norms in r.items() for norm, e in norms.items()],
    verdict=lambda r, t: judge(*[
        (e["squared"]["removed"] > 0, f"{where} {100 * e['squared']['removed']:.0f} % of the squared error goes")
        for where, e in r.items()]),
)
def run_magic_fixup(lab):
    return Outcome(magic_fixup(lab.fixup, lab.quick, lab.out),
                   [("magic_fixup.png", "From above: reference, collage, output, truth.")])


@item(
    "cross_reference", "Section 4.3, ablation", chapter=CHAPTER, cost=270, needs=("mfx_weights",),
    claim="Without cross-reference attention to the untouched photograph, edits come out worse.",
    done="The toy, and one of the same training without its detail extractor, on the same {n} held-out edits: squared "
         "error against the true re-render. The last column is the error without over that with, and its standard "
         "error, by bootstrap over the edits.",
    table=lambda r, t: [["squared error", "collage", "with", "without", "without / with"]] + [
        [where, f"{e['collage']:.4f}", f"{e['with']:.4f}", f"{e['without']:.4f}", plus_minus(e["ratio"])]
        for where, e in r["error"].items()],
    verdict=lambda r, t: judge(*[
        (e["ratio"][0] - 2 * e["ratio"][1] > 1, f"{where}, {plus_minus(e['ratio'])} times the error without it")
        for where, e in r["error"].items()]),
)
def cross_reference(lab):
    edits = user_edits(lab.count(240, 24))
    shown = {"collage": edits["coarse"], "with": fix_up(lab.fixup, edits),
             "without": fix_up(mfx.load(ALONE, lab.dtype, lab.device), edits)}
    draws, error = resampled(len(edits["truth"])), {}
    regions = {"shadows and reflections": edits["changed"], "holes": edits["mask"][:, 0] == 0,
               "everywhere": torch.ones_like(edits["changed"])}
    for where, chosen in regions.items():
        each = {who: ((x - edits["truth"]).square().mean(1) * chosen).sum((1, 2)) for who, x in shown.items()}  # (n,)
        ratio = (draws @ each["without"]) / (draws @ each["with"])
        error[where] = {who: round((e.sum() / chosen.sum()).item(), 5) for who, e in each.items()}
        error[where]["ratio"] = [round((each["without"].sum() / each["with"].sum()).item(), 3),
                                 round(ratio.std().item(), 3)]
    return Outcome({"n": len(draws[0]), "error": error})
