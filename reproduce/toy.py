"""What the shipped toy weights can do, and the README's pictures. Nothing of the papers is claimed here; it is what
their claims at toy size rest upon.

The toy world knows the truth about its scenes, so that what a person would judge by eye is counted: does the sky of
"a red ball on snow at night" have a night's colours, is there snow, is there something red. Scenes are held out: no
training stage draws from these seeds.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import diffdiff
import diffusion
import sample
from common import pictures
from common.files import write_json
from reproduce.lab import DEPTHS, HELD_OUT, OPEN, Outcome, item, judge, toy_distance
from toy import world as toyworld
from toy.world import COLOUR, COLOURS, FIXED, GROUNDS, KINDS, TIME, TIMES

CHAPTER = "The toy weights"


def scenes_of(seed, n, objects=3):
    return toyworld.random_scenes(n, torch.Generator().manual_seed(HELD_OUT + seed), objects)


# ---------------------------------------------------------------------------------------------------------------------
# Colour probes: what is in a picture of the toy world?


def sky_and_ground(images):
    """images (B, 3, H, W) in [0, 1] -> (B, 6): mean colour of the upper fifth, median colour of the lowest eighth"""
    h = images.shape[2]
    sky, land = images[:, :, : h // 5], images[:, :, -h // 8 :]
    return torch.cat([sky.mean((2, 3)), land.flatten(2).median(2).values], 1)


def probe_scene(images):
    """-> (time, ground) as indices (B,): the nearest of the twelve combinations' mean colours in true renders."""
    scenes = scenes_of(1, 600)
    features = sky_and_ground(toyworld.render(scenes).image)
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


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def autoencoder(toy, quick, out):
    """PSNR of the round trip."""
    squared, inside = [], []
    for i in tqdm(range(0, 64 if quick else 512, 32), desc="autoencoder", leave=False):
        frames = toyworld.render(scenes_of(1000 + i, 32))
        back = toy.decode(toy.encode_image(frames.image * 2 - 1)).clamp(-1, 1) / 2 + 0.5
        error = (back - frames.image).square().mean(1)  # (B, H, W)
        squared.append(error.flatten())
        inside.append(error[frames.segments > 0])
    draw_rows(out / "autoencoder.png", frames.image[:8], back[:8])
    psnr = [round(-10 * torch.cat(e).mean().log10().item(), 2) for e in (squared, inside)]
    return {"psnr_db": psnr[0], "psnr_inside_objects_db": psnr[1]}


def adherence(toy, quick, out):
    """Share of text-to-image pictures with the sky, the ground, the object colour that the prompt names; and all three.

    The same probes on true renders of the same scenes say how far the probes themselves can be trusted.
    """
    scenes = scenes_of(2, 32 if quick else 144, objects=1)
    truth = (scenes.time, scenes.ground, scenes.colour[:, 0])
    prompts = [
        f"a {COLOURS[colour]} {KINDS[kind]} on {GROUNDS[ground]} at {TIMES[time]}"
        for time, ground, colour, kind in zip(*truth, scenes.kind[:, 0])
    ]
    sampler, images = diffusion.make_sampler("ddim", toy.schedule, 50), []
    for i in tqdm(range(0, len(prompts), 32), desc="adherence", leave=False):
        noise = torch.randn(len(prompts[i : i + 32]), *latent_shape(toy), generator=torch.Generator().manual_seed(i))
        denoise = toy.denoiser(prompts[i : i + 32], guidance=7.5)
        images.append(toy.decode(diffusion.run_sampler(denoise, noise, sampler)))
    images = (torch.cat(images) / 2 + 0.5).clamp(0, 1)
    draw_rows(out / "adherence.png", images[:8], images[8:16])
    result = {}
    for who, shown in (("true renders", toyworld.render(scenes).image), ("text to image", images)):
        time, ground = probe_scene(shown)
        colour = probe_object(shown, scenes.time)
        right = [(a == b).float() for a, b in zip((time, ground, colour), truth)]
        result[who] = {n: round(r.mean().item(), 3) for n, r in zip(("sky", "ground", "object"), right)}
        result[who]["all three"] = round(torch.stack(right).prod(0).mean().item(), 3)
    return result


def noon_meadows(n):
    """Held-out scenes (n, 3, H, W) in [-1, 1]: various objects on grass at noon."""
    scenes = scenes_of(3, n)
    scenes.time[:], scenes.ground[:] = TIMES.index("noon"), GROUNDS.index("grass")
    return toyworld.render(scenes).image * 2 - 1


def gradient(toy, quick, out):
    """Does the change (mean absolute, over scenes) grow as a gradient map says?

    CAM, pixel by pixel, less the change under a black map, as in the paper. Where day turns into night the sky's colour
    changes more than the ground's at any strength, which a perceptual distance would even out and colours do not: so
    also by column, along which the map is constant.
    """
    n = 8 if quick else 64
    image = noon_meadows(n)
    z_init = toy.encode_image(image)
    back = toy.decode(z_init)
    mu = torch.linspace(0, 1, image.shape[3]).expand(image.shape[2:])
    sampler = diffusion.make_sampler("ddim", toy.schedule, 50)
    denoise = toy.denoiser(["snow at night"] * n, guidance=7.5)
    noise = torch.randn(z_init.shape, generator=torch.Generator().manual_seed(0))
    change = []
    for m in tqdm((mu, torch.zeros_like(mu)), desc="gradient", leave=False):
        edited = toy.decode(diffdiff.differential_diffusion(denoise, z_init, m, sampler, noise))
        change.append((edited - back).abs().mean((0, 1)))
        if m is mu:
            draw_rows(out / "gradient.png", image[:8] / 2 + 0.5, edited[:8] / 2 + 0.5)
    unbiased = change[0] - change[1]
    measured = {"cam": (mu, unbiased), "correlation by column": (mu[0], unbiased.mean(0))}
    return {name: round(diffdiff.cam(*pair), 3) for name, pair in measured.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The README's pictures


def examples(toy, quick, out):
    """The picture, the map, the masks and the collage that the README's commands take."""
    folder = Path(__file__).parent.parent / "examples"
    folder.mkdir(exist_ok=True)
    frame = toyworld.render(toyworld.Scene(
        ground=torch.tensor([0]), time=torch.tensor([0]), horizon=torch.tensor([0.42]), sun=torch.tensor([0.8]),
        texture=torch.tensor([[0.5, 1.0, 2.0, 0.3, 4.0, 1.0]]), camera=torch.zeros(1, 2),
        kind=torch.tensor([[KINDS.index("house"), KINDS.index("tree"), KINDS.index("ball")]]),
        colour=torch.tensor([[COLOURS.index("yellow"), COLOURS.index("green"), COLOURS.index("red")]]),
        x=torch.tensor([[-0.9, 0.25, 0.85]]), z=torch.tensor([[3.4, 3.0, 2.5]]), size=torch.tensor([[0.9, 0.95, 0.62]]),
    ))
    pictures.tensor_to_picture(frame.image[0]).save(folder / "meadow.png")
    mu = np.clip((np.linspace(0, 1, 128) - 0.3) / 0.65, 0, 1)  # a third black: enough to turn day into night
    Image.fromarray(np.tile((mu * 255).round().astype(np.uint8), (128, 1))).save(folder / "gradient.png")
    mask = Image.new("L", (128, 128), 255)
    ImageDraw.Draw(mask).ellipse((84, 80, 134, 128), fill=0)  # around the ball
    mask.save(folder / "mask.png")
    for k, name in ((2, "tree"), (3, "ball")):
        Image.fromarray((frame.segments[0] == k).byte().mul(255).numpy()).save(folder / f"{name}.png")
    write_json(folder / "edits.json", {"image": "meadow.png", "segments": [
        {"mask": "ball.png", "edits": [{"translate": [-45, 2]}]}, {"mask": "tree.png", "edits": [{"delete": True}]},
    ]})
    return {"written": [f"examples/{name}" for name in (
        "meadow.png", "gradient.png", "mask.png", "tree.png", "ball.png", "edits.json")]}


def readme_pictures(toy, quick, out):
    """The README's pictures, by the commands that it names."""
    meadow = ["--image", "examples/meadow.png"]
    gradient = [*meadow, "--change-map", "examples/gradient.png", "--prompt", "snow at night"]
    ball = [*meadow, "--mask", "examples/mask.png", "--softness", "6", "--prompt", "a yellow house on grass at noon"]
    commands = [
        [*gradient, "--sheet", "examples/sheet.png", "--steps-strip", "examples/strip.png"],
        [*ball, "--sheet", "examples/soft.png"],
        [*meadow, "--strength-fan", "5", "--prompt", "snow at night"],
        ["--collage", "examples/edits.json", "--sheet", "examples/collage.png"],
    ]
    results = out / "edit.png", out / "soft.png", Path("examples/fan.png"), out / "collage.png"
    for command, result in zip(commands, results):
        sample.main([*command, "--out", str(result)])
    return {"written": [f"examples/{name}.png" for name in ("sheet", "strip", "fan", "soft", "collage")]}


def latent_shape(model):
    side = model.size // model.vae.config.factor
    return model.vae.config.latent_channels, side, side


def draw_rows(path, *rows):
    """Each row (N, 3, H, W) in [0, 1] -> one PNG."""
    grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    pictures.save_picture(pictures.tensor_to_picture(grid), path, {})


# ---------------------------------------------------------------------------------------------------------------------
# The toy perceptual distance: on which features?


def known_changes(n):
    """n held-out scenes of one object, (n, 3, H, W) in [-1, 1]; the same after changes that hardly matter, and after
    changes that do, {name: pictures} each; where the object is, (n, H, W) bool."""
    g = torch.Generator().manual_seed(HELD_OUT + 77)
    scenes = toyworld.random_scenes(n, g, 1)

    def render(**fields):
        return toyworld.render(replace(scenes, **fields)).image * 2 - 1

    def another(index, options):
        return (index + torch.randint(1, len(options), index.shape, generator=g)) % len(options)

    def shifted(dx, dy):
        return torch.roll(F.pad(x, (2, 2, 2, 2), mode="replicate"), (dy, dx), (2, 3))[:, :, 2:-2, 2:-2]

    frames = toyworld.render(scenes)
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


def distances_by_depth(lab, x, y):
    """{which features: (n, H, W)} for pictures x, y (n, 3, H, W): each depth of the encoder alone, those that are used,
    and pixels."""
    vae, out = lab.model.vae, {}
    which = {f"depth {i}": (i,) for i in range(len(vae.config.channels) + 1)}
    for name, depths in (which | {"used: " + " and ".join(map(str, DEPTHS)): DEPTHS}).items():
        out[name] = torch.cat([toy_distance(vae, a, b, depths)[:, 0] for a, b in zip(x.split(32), y.split(32))])
    return out | {"pixels": (x - y).square().sum(1)}


@item(
    "distance", "The perceptual distance", chapter=CHAPTER, cost=75,
    claim="LPIPS's weights are not shipped. Without them edits are measured by a toy perceptual distance: LPIPS's "
          "construction, with unit weights, on the features of our own autoencoder's encoder, at the depths that do "
          "best below (a Table 1 measured with all depths had been seen before). It is not LPIPS.",
    done="{n} true renders with known changes. Order: how often one that hardly matters (a pixel's shift, a little "
         "blur, noise, ..) measures less than one that does (another colour, kind, place, ground, time). Place: after "
         "a change of the object's colour, the share of all distance that lies on the object, which covers {covers} of "
         "a picture; the encoder's normalization spreads it, more with each depth. The two finest depths have the best "
         "of both.",
    table=lambda r, t: [["features", "order", "place"], *[[n, f"{a:.3f}", f"{b:.2f}"] for n, a, b in r["features"]]],
    verdict=lambda r, t: judge(
        (used(r)[1] >= 0.95, f"{100 * used(r)[1]:.1f} % of pairs of changes are in order"),
        (used(r)[2] >= 0.7, f"{100 * used(r)[2]:.0f} % of the distance is where the change is"),
    ),
)
def run_distance(lab):
    n = lab.count(96, 12)
    x, small, large, there = known_changes(n)
    measured = {k: distances_by_depth(lab, x, y) for k, y in lab.each((small | large).items())}
    found = []
    for features in measured["no object"]:
        low, high = (torch.stack([measured[k][features].mean((1, 2)) for k in kinds]) for kinds in (small, large))
        colour = measured["another colour"][features]
        found.append([features, round((low[:, None] < high).float().mean().item(), 4),
                      round(((colour * there).sum() / colour.sum()).item(), 3)])
    return Outcome({"n": n, "covers": f"{100 * there.float().mean():.0f} %", "features": found})


def used(results):
    return next(row for row in results["features"] if row[0].startswith("used"))


# ---------------------------------------------------------------------------------------------------------------------
# As items


@item(
    "autoencoder", "Autoencoder", chapter=CHAPTER, cost=10,
    claim="Every edit passes through the autoencoder, so it has to keep a scene. At least 32 dB on scenes that it has "
          "not seen, and 27 dB inside objects.",
    done="The round trip of held-out scenes, against themselves.",
    table=lambda r, t: [["where", "PSNR"], ["whole pictures", f"{r['psnr_db']} dB"],
                        ["inside objects", f"{r['psnr_inside_objects_db']} dB"]],
    verdict=lambda r, t: judge(
        (r["psnr_db"] >= 32, f"{r['psnr_db']} dB"),
        (r["psnr_inside_objects_db"] >= 27, f"{r['psnr_inside_objects_db']} dB inside objects"),
    ),
)
def run_autoencoder(lab):
    found = autoencoder(lab.model, lab.quick, lab.out)
    return Outcome(found, [("autoencoder.png", "Above scenes, below their round trip.")])


@item(
    "adherence", "Prompts", chapter=CHAPTER, cost=80,
    claim="The base model paints what a prompt names. In at least 85 % of pictures the sky's time, the ground and the "
          "object's colour are all three as asked for.",
    done="Pictures from text alone, 50 steps of DDIM at a guidance of 7.5, judged by colour probes; the same probes on "
         "true renders of the same scenes say how far they can be trusted.",
    table=lambda r, t: [["pictures", "sky", "ground", "object", "all three"],
                        *[[who, *[f"{100 * v:.1f} %" for v in of.values()]] for who, of in r.items()]],
    verdict=lambda r, t: judge(
        (r["text to image"]["all three"] >= 0.85, f"all three in {100 * r['text to image']['all three']:.1f} %"),
        (r["true renders"]["all three"] >= 0.97, f"the probes see them in {100 * r['true renders']['all three']:.1f} % "
         "of true renders"),
    ),
)
def run_adherence(lab):
    return Outcome(adherence(lab.model, lab.quick, lab.out),
                   [("adherence.png", "Pictures from text: the first sixteen, not the best.")])


@item(
    "gradient", "A gradient map", chapter=CHAPTER, cost=65,
    claim="Colours alone, with no network to judge by: under a gradient map the change grows along with the map.",
    done="Noon meadows turned into snow at night under a gradient from left to right: correlation of the mean absolute "
         "change with the map, column by column and pixel by pixel.",
    table=lambda r, t: [["correlation", ""], ["by column", str(r["correlation by column"])],
                        ["by pixel (CAM, on colours)", str(r["cam"])]],
    verdict=lambda r, t: judge((
        r["correlation by column"] >= 0.9,
        f"{r['correlation by column']} by column; by pixel {r['cam']}, since the sky's colour changes by more than the "
        "ground's at every strength, which is why the paper takes a perceptual distance",
    )),
)
def run_gradient(lab):
    return Outcome(gradient(lab.model, lab.quick, lab.out), [("gradient.png", "Above scenes, below the edits.")])


def nothing(results, timings):
    return OPEN, ""


@item("examples", "README", claim="", done="", table=nothing, verdict=nothing, cost=1, shown=False)
def run_examples(lab):
    return Outcome(examples(lab.model, lab.quick, lab.out))


@item("pictures", "README", claim="", done="", table=nothing, verdict=nothing, cost=60, shown=False)
def run_pictures(lab):
    return Outcome(readme_pictures(lab.model, lab.quick, lab.out))
