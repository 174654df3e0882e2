"""What the shipped toy weights can do, and the README's pictures. Nothing of the papers is claimed here; it is what
their claims at toy size rest upon.

The toy world knows the truth about its scenes, so that what a person would judge by eye is counted: is it night in
"a red ball on snow at night", is there snow, is there something red.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

import sample
import samplers
from checkpoints.parts import TOY_CAPTIONER, load_image_encoder
from reproduce import charts
from reproduce.lab import HELD_OUT, TOY, Outcome, item, judge, percent, progress
from reproduce.metrics import DEPTHS, cam, distances_by_depth
from toy import captions, world
from toy.world import COLOURS, GROUNDS, KINDS, TIMES

STEPS = 50  # of DDIM


@item("autoencoder", "Autoencoder", chapter=TOY)
def autoencoder(lab):
    """The autoencoder keeps a scene that it has not seen to 42 dB, and to 38 dB inside objects.

    The round trip of {n} held-out scenes, against themselves.
    """
    squared, inside = [], []
    for i in progress(range(0, lab.count(512, 64), 32)):
        frames = world.render(lab.scenes(32, 1000 + i))
        back = lab.model.decode(lab.model.encode_image(frames.image.to(lab.device) * 2 - 1)).clamp(-1, 1).cpu()
        error = (back / 2 + 0.5 - frames.image).square().mean(1)  # (B, H, W)
        squared.append(error.flatten())
        inside.append(error[frames.segments > 0])
    lab.save(charts.sheet([frames.image[:8] * 2 - 1, back[:8]]), "autoencoder.png")
    whole, objects = (round(-10 * torch.cat(e).mean().log10().item(), 2) for e in (squared, inside))
    return Outcome(
        {"n": 32 * len(squared), "psnr_db": whole, "psnr_inside_objects_db": objects},
        judge((whole >= 42, f"{whole} dB"), (objects >= 38, f"{objects} dB inside objects")),
        [["where", "PSNR"], ["whole pictures", f"{whole} dB"], ["inside objects", f"{objects} dB"]],
        [("autoencoder.png", "Above scenes, below their round trip.")])


# ---------------------------------------------------------------------------------------------------------------------
# Prompts: is what they say in the pictures?


def see(lab, images):
    """What the toy's captioner sees in pictures (B, 3, S, S) in [0, 1], as toy.captions.read_scenes says it: time (B,),
    ground (B,), kind (B, 3), 0 = none, colour (B, 3)"""
    encoder = load_image_encoder(TOY_CAPTIONER, torch.float32, lab.device)
    with torch.no_grad():
        scores = torch.cat([encoder.embed(x.to(lab.device) * 2 - 1).cpu() for x in images.split(64)])
    return [s.argmax(-1) for s in captions.split_scores(scores)]


def paint_scenes(lab, n):
    """-> n held-out Scenes of one object, and (n, 3, S, S) in [0, 1], painted from what they are called alone"""
    model, images, scenes = lab.model, [], lab.scenes(n, 2, objects=1)
    prompts = captions.caption_scenes(scenes)
    config, sampler = model.vae.config, samplers.make_sampler("ddim", model.schedule, STEPS)
    for i in progress(range(0, len(prompts), 32)):
        batch, side = prompts[i : i + 32], model.size // config.factor
        noise = torch.randn(len(batch), config.latent_channels, side, side, generator=torch.Generator().manual_seed(i))
        denoise = model.denoiser(batch, guidance=7.5)
        images.append(model.decode(samplers.run_sampler(denoise, noise.to(lab.device), sampler)).cpu())
    return scenes, torch.cat(images).clamp(-1, 1) / 2 + 0.5


@item("adherence", "Prompts", chapter=TOY)
def adherence(lab):
    """In at least 97 % of pictures each, the sky's time, the ground, the object's colour and its kind are as the prompt
    says.

    {n} pictures from text alone, 50 steps of DDIM at a guidance of 7.5, judged by the toy's captioner; what it sees in
    true renders of the same scenes says how far it can be trusted.
    """
    scenes, images = paint_scenes(lab, lab.count(256, 32))
    lab.save(charts.sheet((images[:16] * 2 - 1).split(8)), "adherence.png")
    truth, found = captions.read_scenes(scenes), {}
    for who, shown in (("true renders", world.render(scenes).image), ("text to image", images)):
        time, ground, kind, colour = (a == b for a, b in zip(see(lab, shown), truth))
        right = {"sky": time, "ground": ground, "colour": colour[:, 0], "kind": kind[:, 0]}
        right["all but kind"] = time & ground & colour[:, 0]
        found[who] = {what: round(r.float().mean().item(), 3) for what, r in right.items()}
    painted, rendered = found["text to image"], min(found["true renders"].values())
    parts = [(painted[what] >= 0.97, f"the {what} is right in {percent(painted[what], 1)}")
             for what in ("sky", "ground", "colour", "kind")]
    return Outcome(
        {"n": len(scenes)} | found,
        judge(*parts, (rendered >= 0.97, f"the captioner is right in {percent(rendered, 1)} of true renders or more")),
        [["pictures", *painted], *([who, *(percent(v, 1) for v in of.values())] for who, of in found.items())],
        [("adherence.png", "Pictures from text: the first sixteen, not the best.")])


@item("gradient", "A gradient map", chapter=TOY)
def gradient(lab):
    """Colours alone, with no network to judge by: under a gradient map the change grows along with the map.

    {n} noon meadows turned into snow at night under a gradient from left to right. The map's correlation, column by
    column, with the mean absolute change less that under a black map; pixel by pixel, with its share of that under a
    black map. That is lower, since colours are compared: from noon to night the sky changes more than the ground.
    """
    image = world.render(lab.meadows(lab.count(32, 8))).image * 2 - 1
    mu = torch.linspace(0, 1, image.shape[3]).expand(image.shape[2:])
    edited, black, back = (lab.edit(image, m, "snow at night", steps=STEPS)
                           for m in (mu, torch.zeros_like(mu), torch.ones_like(mu)))
    lab.save(charts.sheet([image[:8], edited[:8]]), "gradient.png")
    change, most = ((x - back).abs().mean((0, 1)) for x in (edited, black))
    by_pixel = round(cam(mu, change / most), 3)
    by_column = round(cam(mu[0], (change - most).mean(0)), 3)
    return Outcome(
        {"n": len(image), "cam": by_pixel, "correlation by column": by_column},
        judge((by_column >= 0.99, f"{by_column} by column"), (by_pixel >= 0.6, f"{by_pixel} by pixel")),
        [["correlation", ""], ["by column", str(by_column)], ["by pixel (CAM, on colours)", str(by_pixel)]],
        [("gradient.png", "Above scenes, below the edits.")])


# ---------------------------------------------------------------------------------------------------------------------
# The toy perceptual distance: on which features?


def make_known_changes(n):
    """n held-out scenes of one object, (n, 3, H, W) in [-1, 1]; the same after changes that hardly matter, and after
    changes that do, {name: pictures} each; where the object is, (n, H, W) bool."""
    g = torch.Generator().manual_seed(HELD_OUT + 77)
    scenes = world.random_scenes(n, g, 1)

    def render(**fields):
        return world.render(replace(scenes, **fields)).image * 2 - 1

    def another(index, options):
        return (index + torch.randint(1, len(options), index.shape, generator=g)) % len(options)

    def shifted(dx, dy):
        return torch.roll(F.pad(x, (2, 2, 2, 2), mode="replicate"), (dy, dx), (2, 3))[:, :, 2:-2, 2:-2]

    frames = world.render(scenes)
    x = frames.image * 2 - 1
    small = {
        "moved by a pixel": shifted(1, 0), "moved aslant by a pixel": shifted(1, 1),
        "brighter by 4 %": ((x + 1) * 1.04 - 1).clamp(-1, 1),
        "noise of 4/255": x + 8 / 255 * torch.randn(x.shape, generator=g),
        "blurred a little": F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1),
        "other waves": render(texture=scenes.texture + 0.3 * torch.randn(scenes.texture.shape, generator=g)),
    }
    large = {
        "another colour": render(colour=another(scenes.colour, COLOURS)),
        "another kind": render(kind=another(scenes.kind, KINDS)),
        "no object": render(kind=torch.full_like(scenes.kind, -1)), "object moved": render(x=scenes.x + 0.5),
        "another ground": render(ground=another(scenes.ground, GROUNDS)),
        "another time": render(time=another(scenes.time, TIMES)),
    }
    return x, small, large, frames.segments > 0


def measure_by_depth(lab, x, y):
    """{which features: (n, H, W)} for pictures x, y (n, 3, H, W): each depth of the encoder alone, those that are used,
    and pixels."""
    parts = [distances_by_depth(lab.model.vae, a, b) for a, b in zip(x.split(32), y.split(32))]
    each = [torch.cat(depth)[:, 0] for depth in zip(*parts)]
    found = {f"depth {i}": d for i, d in enumerate(each)}
    return found | {f"used: the first {DEPTHS}": sum(each[:DEPTHS]), "pixels": (x - y).square().sum(1)}


@item("distance", "The perceptual distance", chapter=TOY)
def distance(lab):
    """Without LPIPS's weights edits are measured by a toy perceptual distance. It is LPIPS's construction with unit
    weights, on our own autoencoder's encoder, at its first two depths. Deeper ones put more pairs in order, and the
    change less where it is; on these changes plain pixels do better in both. It is not LPIPS.

    {n} true renders with known changes. Order: how often one that hardly matters (a pixel's shift, a little blur,
    noise, ..) measures less than one that does (another colour, kind, place, ground, time). Place: after a change of
    the object's colour, the share of the distance on the object, {covers} of a picture.
    """
    n = lab.count(96, 12)
    x, small, large, there = make_known_changes(n)
    measured = {k: measure_by_depth(lab, x, y) for k, y in progress((small | large).items())}
    found = []
    for features in measured["no object"]:
        low, high = (torch.stack([measured[k][features].mean((1, 2)) for k in kinds]) for kinds in (small, large))
        colour = measured["another colour"][features]
        found.append([features, round((low[:, None] < high).float().mean().item(), 4),
                      round(((colour * there).sum() / colour.sum()).item(), 3)])
    order, place = next((a, b) for name, a, b in found if name.startswith("used"))
    return Outcome(
        {"n": n, "covers": percent(there.float().mean()), "features": found},
        judge((order >= 0.95, f"{percent(order, 1)} of pairs of changes are in order"),
              (place >= 0.7, f"{percent(place)} of the distance is where the change is")),
        [["features", "order", "place"], *([name, f"{a:.3f}", f"{b:.2f}"] for name, a, b in found)])


@item("pictures", "README", chapter=None)
def pictures(lab):
    """The README has pictures.

    They are drawn by the commands that it names.
    """
    meadow = ["--image", "examples/meadow.png"]
    gradient = [*meadow, "--change-map", "examples/gradient.png", "--prompt", "snow at night"]
    ball = [*meadow, "--mask", "examples/mask.png", "--softness", "6", "--prompt", "a purple mushroom on grass at noon"]
    moved = ["--collage", "examples/edits.json", "--samples", "3"]
    commands = {
        lab.out / "edit.png": [*gradient, "--sheet", "examples/sheet.png", "--steps-strip", "examples/strip.png"],
        lab.out / "soft.png": [*ball, "--sheet", "examples/soft.png"],
        "examples/fan.png": [*meadow, "--strength-fan", "5", "--prompt", "snow at night"],
        lab.out / "collage.png": [*moved, "--sheet", "examples/collage.png"],
    }
    for result, command in commands.items():
        sample.main([*command, "--out", str(result)])
    return Outcome({})
