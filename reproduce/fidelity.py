"""How faithful the toys are, thing by thing: photographs, captions, silhouettes, what a mask keeps.

As toy.py, of which it goes on. Nothing of the papers is claimed here.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.pictures import picture_to_tensor
from editing import paste
from reproduce import charts
from reproduce.dd_tables import distance_from
from reproduce.lab import TOY, NotHere, Outcome, item, judge, percent, to_bytes
from reproduce.metrics import mean_error
from reproduce.mfx_tables import (
    COLLAGE,
    EVERYWHERE,
    SHADOWS,
    compare_to_truth,
    fix_user_edits,
    make_user_edits,
)
from reproduce.toy import STEPS, see
from toy import captions, world
from toy.edits import VERBS
from toy.world import KINDS

# ---------------------------------------------------------------------------------------------------------------------
# Photographs

PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
    "retina.jpg", "rocket.jpg",
)


def open_photographs(size):
    """The sixteen that scikit-image ships -> (16, 3, size, size) in [-1, 1]. NotHere without it."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise NotHere("the photographs are scikit-image's: pip install scikit-image")
    folder = Path(package.submodule_search_locations[0]) / "data"
    return torch.cat([picture_to_tensor(Image.open(folder / name), (size, size)) for name in PHOTOGRAPHS])


@item("photographs", "Photographs", chapter=TOY)
def photographs(lab):
    """The autoencoder, which has never seen one, keeps a photograph of 128 pixels to 30 dB.

    The round trip of the sixteen photographs that scikit-image ships, their middle square: the mean of their PSNRs.
    """
    image = open_photographs(lab.model.size)
    back = torch.cat([lab.model.decode(lab.model.encode_image(x.to(lab.device))).cpu() for x in image.split(4)])
    psnr = -10 * ((back.clamp(-1, 1) - image) / 2).square().flatten(1).mean(1).log10()
    rows = [x for pair in zip(image.split(8), back.split(8)) for x in pair]
    lab.save(charts.sheet(rows), "photographs.png")
    mean = round(psnr.mean().item(), 2)
    each = {name.split(".")[0]: round(p, 2) for name, p in zip(PHOTOGRAPHS, psnr.tolist())}
    return Outcome({"psnr_db": mean, "each": each}, judge((mean >= 30, f"{mean} dB")),
                   [["photograph", "PSNR"], *([name, f"{p} dB"] for name, p in each.items()), ["mean", f"{mean} dB"]],
                   [("photographs.png", "In turn eight photographs and their round trip.")])


# ---------------------------------------------------------------------------------------------------------------------
# Words for pictures


@item("captions", "Words for pictures", chapter=TOY, needs=())
def captions_of_scenes(lab):
    """The toy's captioner says what is in a picture: at least nine captions of ten are right in every word.

    {n} held-out scenes of one to three objects, in pictures of 128 pixels; what the captions name of each.
    """
    scenes = lab.scenes(lab.count(1024, 64), 90)
    said = see(lab, world.render(scenes).image)
    time, ground, kind, colour = captions.read_scenes(scenes)
    there = kind > 0
    right = {"hour": said[0] == time, "ground": said[1] == ground,
             "number of objects": (said[2] > 0).sum(1) == there.sum(1), "kinds": (said[2] == kind).all(1),
             "colours": ((said[3] == colour) | ~there).all(1)}
    right["every word"] = torch.stack([right[what] for what in ("hour", "ground", "kinds", "colours")]).all(0)
    found = {what: mean_error(r.float()) for what, r in right.items()}
    whole = found["every word"]
    return Outcome({"n": len(scenes)} | found,
                   judge((whole[0] >= 0.9, f"every word is right in {percent(whole)} of the captions")),
                   [["right", ""], *([what, percent(share, 1)] for what, share in found.items())])


# ---------------------------------------------------------------------------------------------------------------------
# Magic Fixup: silhouettes, and pixels that are as good as right

CLOSE = 8 / 255  # an error that hardly anybody sees
STANDS_OUT = 0.1  # the difference from the background that makes a silhouette


def silhouettes(images, after, slots):
    """Where the edited object stands out from what is behind it: images (n, 3, S, S) in [0, 1] -> (n, S, S) bool, and
    where that can be judged, (n, S, S) bool: near the object, and not where its own shadow or reflection falls."""
    row = torch.arange(len(after))
    gone = after.kind.clone()
    gone[row, slots] = -1
    truth, behind = world.render(after), world.render(replace(after, kind=gone)).image
    there = truth.segments == slots[:, None, None] + 1
    near = F.max_pool2d(there[:, None].float(), 11, 1, 5)[:, 0] > 0
    shadow = ((truth.image - behind).abs().amax(1) > STANDS_OUT / 2) & ~there
    return (images - behind).abs().amax(1) > STANDS_OUT, near & ~shadow


def overlap(a, b, where):
    """Intersection over union of (n, S, S) bool -> (n,), NaN where neither has a pixel"""
    both, either = ((x & where).sum((1, 2)) for x in (a & b, a | b))
    return both / either


@item("fidelity", "What an edit keeps", chapter=TOY, needs=("mfx_weights",))
def fidelity(lab):
    """Magic Fixup's results are nearer to the truth than the collage, and what was moved keeps its outline.

    Two sets of {n} held-out edits, the first is that of Section 4.1. Absolute and squared error, over the collage's;
    the share of pixels inside the edited objects that are within 8/255 of the truth; the intersection over union of the
    objects' silhouettes with the truth's, by kind of object and by edit.
    """
    model, n = lab.fixup(), lab.count(120, 24)
    results, table, claims = {"n": n}, [["", "first set", "second set"]], []
    for name, seed in (("first set", 4), ("second set", 5)):
        edits, output = make_user_edits(n, model.size, seed), fix_user_edits(model, n, seed)
        coarse, truth, shown = edits["coarse"], edits["truth"], {COLLAGE: edits["coarse"], "output": output}
        absolute, squared = (compare_to_truth(shown, edits, COLLAGE, norm) for norm in (torch.abs, torch.square))
        found = {"absolute error, over the collage's": absolute[EVERYWHERE]["ratio"]["output"]}
        found |= {f"squared error left, {where}": squared[where]["ratio"]["output"] for where in (EVERYWHERE, SHADOWS)}
        inside = edits["object"]
        has = inside.flatten(1).any(1)
        close = ((output - truth).abs().amax(1) <= CLOSE) & inside
        found["pixels of objects within 8/255"] = mean_error((close.sum((1, 2)) / inside.sum((1, 2)))[has])
        after, slots = edits["after"], edits["slot"]
        ours, where = silhouettes(output, after, slots)
        true, _ = silhouettes(truth, after, slots)
        iou = overlap(ours, true, where)
        names = [(KINDS[k], v) for k, v in zip(after.kind[torch.arange(n), slots].clamp(min=0).tolist(), edits["verb"])]
        for group in (*KINDS, *VERBS):
            some = torch.tensor([has[i].item() and group in names[i] for i in range(n)]) & iou.isfinite()
            if some.sum() > 1:
                found[f"silhouettes, {group}"] = mean_error(iou[some])
        results[name] = found
    for row in results["first set"]:
        table.append([row, *("{:.3f} ± {:.3f}".format(*results[s].get(row, [float("nan")] * 2))
                             for s in ("first set", "second set"))])
    limits = {"absolute error, over the collage's": (None, 1.2), "squared error left, everywhere": (None, 0.4),
              f"squared error left, {SHADOWS}": (None, 0.2), "pixels of objects within 8/255": (0.75, None)}
    for row, (least, most) in limits.items():
        values = [results[s][row][0] for s in ("first set", "second set")]
        good = all(v >= least for v in values) if most is None else all(v <= most for v in values)
        claims.append((good, f"{row}: {values[0]:.2f} and {values[1]:.2f}"))
    worst = min((v[0], s) for f in (results["first set"], results["second set"]) for s, v in f.items() if "silh" in s)
    claims.append((worst[0] >= 0.9, f"the worst group of silhouettes overlaps by {worst[0]:.2f} ({worst[1]})"))
    rows = [x[:8] * 2 - 1 for x in (edits["reference"], coarse, output, truth)]
    lab.save(charts.sheet(rows), "fidelity.png")
    return Outcome(results, judge(*claims), table,
                   [("fidelity.png", "References, collages, results, and the truth: the second set's first eight.")])


# ---------------------------------------------------------------------------------------------------------------------
# What is kept

@item("kept", "What a map keeps", chapter=TOY, needs=("weights", "inpainting_weights"))
def kept(lab):
    """A disc that is painted anew changes nothing outside it by more than 2/255 on average, by the autoencoder alone;
    with --paste-back it changes nothing there at all, and an inpainting model paints the asked colour.

    {n} held-out scenes without objects, a black disc in a white map. The captioner names the colour.
    """
    n, size = lab.count(32, 8), lab.model.size
    scenes = lab.scenes(n, 70, objects=1)
    image = world.render(replace(scenes, kind=torch.full_like(scenes.kind, -1))).image * 2 - 1
    mu = (distance_from(size, 0.5, 0.6) > 0.3).float()
    prompts, outside = captions.caption_scenes(scenes), mu == 1
    edited = lab.edit(image, mu, prompts, steps=STEPS)
    change = round(((edited - image).abs() * 127.5)[..., outside].mean().item(), 3)
    found, claims = {"n": n, "changed outside, of 255": change}, [(change <= 2, f"{change} of 255 outside the disc")]
    table = [["", ""], ["changed outside the disc", f"{change} of 255"]]
    shown = [image[:8], edited[:8]]
    if lab.inpainting:
        painted, most = lab.inpaint(image, mu, prompts, steps=STEPS), 0
        for before, after in zip(map(to_bytes, image), map(to_bytes, painted)):
            *_, over_photo = paste.prepare(Image.fromarray(before), None, mu[None, None], (size, size))
            pasted = np.asarray(over_photo(Image.fromarray(after))).astype(int)
            most = max(most, np.abs(pasted - before)[outside.numpy()].max().item())
        right = (see(lab, painted / 2 + 0.5)[3][:, 0] == scenes.colour[:, 0]).float()
        found |= {"of 255, after paste-back": most, "asked colour": mean_error(right)}
        table += [["at most, after --paste-back", f"{most} of 255"], ["asked colour", percent(mean_error(right))]]
        claims += [(most == 0, f"{most} of 255 after --paste-back"),
                   (right.mean() >= 0.95, f"the asked colour in {percent(right.mean())}")]
        shown.append(painted[:8])
    lab.save(charts.sheet(shown), "kept.png")
    return Outcome(found, judge(*claims), table,
                   [("kept.png", "Scenes, a disc of each changed, and painted by the inpainting model.")])

