"""What the shipped toy weights can do, and the README's pictures. Nothing of the papers is claimed here; it is what
their claims at toy size rest upon.

The toy world knows the truth about its scenes, so that what a person would judge by eye is counted: does the sky of
"a red ball on snow at night" have a night's colours, is there snow, is there something red.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

import sample
import samplers
from reproduce import charts
from reproduce.lab import HELD_OUT, TOY, Outcome, item, judge, percent, progress, prompts_of
from reproduce.metrics import DEPTHS, cam, sky_and_ground, toy_distance
from toy import world
from toy.world import COLOUR, COLOURS, FIXED, GROUNDS, KINDS, TIME, TIMES

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
# Prompts, by colour probes: what is in a picture of the toy world?


def probe_scene(lab, images):
    """-> (time, ground) as indices (B,): the nearest of the twelve combinations' mean colours in true renders."""
    scenes = lab.scenes(600, 1)
    features = sky_and_ground(world.render(scenes).image)
    group = scenes.time * len(GROUNDS) + scenes.ground
    centres = torch.stack([features[group == g].mean(0) for g in range(len(TIMES) * len(GROUNDS))])
    nearest = torch.cdist(sky_and_ground(images), centres).argmin(1)
    return nearest // len(GROUNDS), nearest % len(GROUNDS)


def probe_object(images, time):
    """Which colour do the objects have? images (B, 3, H, W), time (B,) -> (B,) index into COLOURS

    The light's tint is divided out. Then each pixel below the horizon votes for the nearest of: every object colour and
    fixed colour in three shades, and its row's median in five (ground, lit and shadowed).
    """
    x = images / TIME[time, :3, None, None]
    ground = x.median(3, keepdim=True).values
    shades = torch.tensor([0.5, 0.75, 1.0])
    candidates = torch.cat([COLOUR[:, None] * shades[:, None], FIXED[1:, None] * shades[:, None]]).flatten(0, 1)
    distance = torch.stack(
        [(x - c[:, None, None]).abs().sum(1) for c in candidates]
        + [(x - ground * s).abs().sum(1) for s in (0.5, 0.65, 0.8, 1.0, 1.1)], 1,
    )  # (B, candidates, H, W)
    below = slice(int(0.42 * x.shape[2]), int(0.97 * x.shape[2]))
    nearest = distance[:, :, below].argmin(1) // len(shades)
    votes = torch.stack([(nearest == c).flatten(1).sum(1) for c in range(len(COLOURS))], 1).float()
    votes[:, COLOURS.index("white")] /= 2  # haze and highlights are whitish too
    return votes.argmax(1)


@torch.inference_mode()
def paint_prompts(lab, prompts):
    """-> (N, 3, S, S) in [-1, 1], from text alone: 50 steps of DDIM at a guidance of 7.5"""
    model, images = lab.model, []
    config, sampler = model.vae.config, samplers.make_sampler("ddim", model.schedule, STEPS)
    for i in progress(range(0, len(prompts), 32)):
        batch, side = prompts[i : i + 32], model.size // config.factor
        noise = torch.randn(len(batch), config.latent_channels, side, side, generator=torch.Generator().manual_seed(i))
        denoise = model.denoiser(batch, guidance=7.5)
        images.append(model.decode(samplers.run_sampler(denoise, noise.to(lab.device), sampler)).cpu())
    return torch.cat(images).clamp(-1, 1)


@item("adherence", "Prompts", chapter=TOY)
def adherence(lab):
    """In at least 97 % of pictures each, the sky's time, the ground and the object's colour are as the prompt says.

    {n} pictures from text alone, 50 steps of DDIM at a guidance of 7.5, judged by colour probes; the same probes on
    true renders of the same scenes say how far they can be trusted.
    """
    scenes = lab.scenes(lab.count(256, 32), 2, objects=1)
    truth, prompts = (scenes.time, scenes.ground, scenes.colour[:, 0]), prompts_of(scenes)
    images = paint_prompts(lab, prompts)
    lab.save(charts.sheet(images[:16].split(8)), "adherence.png")
    found = {}
    for who, shown in (("true renders", world.render(scenes).image), ("text to image", images / 2 + 0.5)):
        seen = (*probe_scene(lab, shown), probe_object(shown, scenes.time))
        right = [(a == b).float() for a, b in zip(seen, truth)]
        found[who] = {n: round(r.mean().item(), 3) for n, r in zip(("sky", "ground", "object"), right)}
        found[who]["all three"] = round(torch.stack(right).prod(0).mean().item(), 3)
    painted = found["text to image"]
    parts = [(painted[what] >= 0.97, f"the {what} is right in {percent(painted[what], 1)}")
             for what in ("sky", "ground", "object")]
    probes = found["true renders"]["all three"]
    return Outcome(
        {"n": len(scenes)} | found,
        judge(*parts, (probes >= 0.97, f"the probes see all three in {percent(probes, 1)} of true renders")),
        [["pictures", "sky", "ground", "object", "all three"],
         *([who, *(percent(v, 1) for v in of.values())] for who, of in found.items())],
        [("adherence.png", "Pictures from text: the first sixteen, not the best.")])


@item("gradient", "A gradient map", chapter=TOY)
def gradient(lab):
    """Colours alone, with no network to judge by: under a gradient map the change grows along with the map.

    {n} noon meadows turned into snow at night under a gradient from left to right. The map's correlation, column by
    column, with the mean absolute change less that under a black map; pixel by pixel, with its share of that under a
    black map. That is lower, since colours are compared: from noon to night the sky changes more than the ground.
    """
    image = world.render(lab.meadows(lab.count(64, 8))).image * 2 - 1
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
    vae, out = lab.model.vae, {}
    which = {f"depth {i}": (i,) for i in range(len(vae.config.channels) + 1)}
    for name, depths in (which | {"used: " + " and ".join(map(str, DEPTHS)): DEPTHS}).items():
        out[name] = torch.cat([toy_distance(vae, a, b, depths)[:, 0] for a, b in zip(x.split(32), y.split(32))])
    return out | {"pixels": (x - y).square().sum(1)}


@item("distance", "The perceptual distance", chapter=TOY)
def distance(lab):
    """Without LPIPS's weights edits are measured by a toy perceptual distance. It is LPIPS's construction with unit
    weights, on our own autoencoder's encoder, at the depths that do best below (a Table 1 with all depths had been seen
    before). It is not LPIPS.

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
    commands = {
        lab.out / "edit.png": [*gradient, "--sheet", "examples/sheet.png", "--steps-strip", "examples/strip.png"],
        lab.out / "soft.png": [*ball, "--sheet", "examples/soft.png"],
        "examples/fan.png": [*meadow, "--strength-fan", "5", "--prompt", "snow at night"],
        lab.out / "collage.png": ["--collage", "examples/edits.json", "--sheet", "examples/collage.png"],
    }
    for result, command in commands.items():
        sample.main([*command, "--out", str(result)])
    return Outcome({})
