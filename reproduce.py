"""What is claimed about the shipped toy weights, measured again, and the README's pictures, drawn again.

    python reproduce.py                        everything, into reproduced/ and examples/
    python reproduce.py --only autoencoder     one item of SECTIONS
    python reproduce.py --quick                fewer samples, to see that it works

The toy world knows the truth about its scenes, so that what a person would judge by eye is counted here: does the sky
of "a red ball on snow at night" have a night's colours, is there snow, is there something red. Scenes are held out:
no training stage draws from these seeds.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import collage
import diffdiff
import diffusion
import layouts
import mfx
import sample
import sd
import toyworld
from toyworld import COLOUR, COLOURS, FIXED, GROUNDS, KINDS, TIME, TIMES

HELD_OUT = 10**9  # train.at() stays below it for the seeds that train.py takes


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
    scenes = scenes_of(2, 32 if quick else 288, objects=1)
    truth = (scenes.time, scenes.ground, scenes.colour[:, 0])
    prompts = [
        f"a {COLOURS[colour]} {KINDS[kind]} on {GROUNDS[ground]} at {TIMES[time]}"
        for time, ground, colour, kind in zip(*truth, scenes.kind[:, 0])
    ]
    sampler, images = diffusion.make("ddim", toy.schedule, 50), []
    for i in tqdm(range(0, len(prompts), 32), desc="adherence", leave=False):
        noise = torch.randn(len(prompts[i : i + 32]), *latent_shape(toy), generator=torch.Generator().manual_seed(i))
        images.append(toy.decode(diffusion.sample(toy.denoiser(prompts[i : i + 32], guidance=7.5), noise, sampler)))
    images = (torch.cat(images) / 2 + 0.5).clamp(0, 1)
    draw_rows(out / "adherence.png", images[:8], images[8:16])
    result = {}
    for who, pictures in (("true renders", toyworld.render(scenes).image), ("text to image", images)):
        time, ground = probe_scene(pictures)
        colour = probe_object(pictures, scenes.time)
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
    sampler = diffusion.make("ddim", toy.schedule, 50)
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


def baselines(toy, quick, out):
    """Section 5.1 and Figure 3 on the gradient, and blended latent diffusion on half of it: CAM, and a sheet."""
    n = 2 if quick else 16
    image, mu = noon_meadows(n), torch.linspace(0, 1, 128).expand(128, 128)
    sampler, levels = diffusion.make("ddim", toy.schedule, 20), 4 if quick else 20
    denoise = toy.denoiser(["snow at night"] * n, guidance=7.5)
    z_init = toy.encode_image(image)
    noise = torch.randn(z_init.shape, generator=torch.Generator().manual_seed(0))
    back = toy.decode(z_init)

    def edit(picture, m, **options):
        z = diffdiff.differential_diffusion(denoise, toy.encode_image(picture), m, sampler, noise, **options)
        return toy.decode(z)

    half = (mu > 0.5).float()
    edits = {
        "ours": lambda: edit(image, mu),
        "no nesting": lambda: edit(image, mu, nested=False),
        "blended latent diffusion": lambda: toy.decode(
            diffdiff.blended_latent_diffusion(denoise, z_init, half, sampler, noise)
        ),
        "masked noise": lambda: toy.decode(diffdiff.masked_noise(denoise, z_init, mu, sampler, noise)),
        f"composition of {levels}": lambda: diffdiff.composition(edit, image, mu, levels),
        f"tiling, {levels} tiles": lambda: diffdiff.tiling(edit, image, mu, levels),
        "five tiles": lambda: diffdiff.five_tiles(edit, image, mu),
    }
    black = (edit(image, torch.zeros_like(mu)) - back).abs().mean((0, 1))
    result, shown = {}, [sample.tensor_to_picture(image[0] / 2 + 0.5)]
    for name, run in tqdm(edits.items(), desc="baselines", leave=False):
        edited = run()
        change = (edited - back).abs().mean((0, 1)) - black
        result[name] = {"cam": round(diffdiff.cam(mu, change), 3)}
        shown.append(sample.tensor_to_picture(edited[0] / 2 + 0.5))
    sample.save_picture(sample.labelled(shown, ["input", *edits]), out / "baselines.png", {})
    return result


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
    columns = [sample.tensor_to_picture(torch.cat([x[i] for x in rows], 1)) for i in first]
    sample.save_picture(sample.labelled(columns, toyworld.VERBS), out / "magic_fixup.png", {})
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The README's pictures


def examples(toy, quick, out):
    """The picture, the map, the masks and the collage that the README's commands take."""
    folder = Path(__file__).parent / "examples"
    folder.mkdir(exist_ok=True)
    frame = toyworld.render(toyworld.Scene(
        ground=torch.tensor([0]), time=torch.tensor([0]), horizon=torch.tensor([0.42]), sun=torch.tensor([0.8]),
        texture=torch.tensor([[0.5, 1.0, 2.0, 0.3, 4.0, 1.0]]), camera=torch.zeros(1, 2),
        kind=torch.tensor([[KINDS.index("house"), KINDS.index("tree"), KINDS.index("ball")]]),
        colour=torch.tensor([[COLOURS.index("yellow"), COLOURS.index("green"), COLOURS.index("red")]]),
        x=torch.tensor([[-0.9, 0.25, 0.85]]), z=torch.tensor([[3.4, 3.0, 2.5]]), size=torch.tensor([[0.9, 0.95, 0.62]]),
    ))
    sample.tensor_to_picture(frame.image[0]).save(folder / "meadow.png")
    mu = np.clip((np.linspace(0, 1, 128) - 0.3) / 0.65, 0, 1)  # a third black: enough to turn day into night
    Image.fromarray(np.tile((mu * 255).round().astype(np.uint8), (128, 1))).save(folder / "gradient.png")
    mask = Image.new("L", (128, 128), 255)
    ImageDraw.Draw(mask).ellipse((84, 80, 134, 128), fill=0)  # around the ball
    mask.save(folder / "mask.png")
    for k, name in ((2, "tree"), (3, "ball")):
        Image.fromarray((frame.segments[0] == k).byte().mul(255).numpy()).save(folder / f"{name}.png")
    layouts.write_json(folder / "edits.json", {"image": "meadow.png", "segments": [
        {"mask": "ball.png", "edits": [{"translate": [-45, 2]}]}, {"mask": "tree.png", "edits": [{"delete": True}]},
    ]})
    return {"written": [f"examples/{name}" for name in (
        "meadow.png", "gradient.png", "mask.png", "tree.png", "ball.png", "edits.json")]}


def pictures(toy, quick, out):
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
    sample.save_picture(sample.tensor_to_picture(grid), path, {})


SECTIONS = {f.__name__: f for f in (examples, pictures, autoencoder, adherence, gradient, baselines, magic_fixup)}


def main():
    parser = sample.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SECTIONS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--weights", type=Path, default=sample.TOY)
    parser.add_argument("--mfx-weights", type=Path, default=sample.TOY_MFX, help="of the section magic_fixup")
    parser.add_argument("--out", type=Path, default=Path("reproduced"))
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in [args.only] if args.only else SECTIONS:
            fixup = name == magic_fixup.__name__
            model = mfx.load(args.mfx_weights, torch.float32) if fixup else sd.load(args.weights, torch.float32)
            with torch.inference_mode():
                print(json.dumps({name: SECTIONS[name](model, args.quick, args.out)}), flush=True)
    except (ValueError, OSError) as e:
        parser.error(e)


if __name__ == "__main__":
    main()
