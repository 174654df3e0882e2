"""Edit a picture from the command line, each pixel by as much as you say.

    python sample.py --image P.png --change-map M.png --prompt "snow at night"    black changes fully, white stays
    python sample.py --image P.png --change-map depth --prompt "..."              computed from depth, or from segments
    python sample.py --image P.png --mask M.png --softness 8 --prompt "..."       soft-inpainting: black is repainted
    python sample.py --image P.png --strength-fan 5 --prompt "..."                columns of growing strength
    python sample.py --image P.png --strength 0.6 --prompt "..."                  one strength everywhere (SDEdit)
    python sample.py --prompt "..."                                               text to image
    python sample.py --image P.png --edit E.png                  Magic Fixup of a coarse edit; its alpha 0 marks holes
    python sample.py --collage edits.json                        the same, the edit written down: editing/edits_json.py
    python sample.py --image P.png --edit E.png --change-map M.png        both papers: white stays as it is in the edit

Maps and masks are black where the picture changes and white where it is kept, as in the Differential Diffusion paper;
computed ones, 0 and 1. --white-is-change takes them the other way round, as many other tools do. Without --weights the
toy models run that this project trained and ships; --weights takes any Stable Diffusion 1.x or 2.x: a folder,
.safetensors or .ckpt, or for --edit and --collage a Magic Fixup: a folder, or the released file.
"""

import argparse
import functools
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import collage
import diffdiff
import diffusion
import mfx
import sd
import vae
from checkpoints import published
from common.cli import TOY, TOY_MFX, Parser, number, report_errors
from common.devices import choose_device, choose_precision, compile_unets, make_fast
from common.pictures import (
    fit_edit,
    fitted_size,
    labelled,
    labelled_columns,
    map_over,
    map_to_tensor,
    on_checkerboard,
    open_picture,
    picture_to_tensor,
    save_pictures,
    tensor_to_picture,
    to_rgb,
)
from editing import change_maps as maps
from editing.edits_json import read_edits
from kernels.memory import hold_memory
from networks import sam

# Defaults of what is left out: with a prompt, as in the one paper; with a coarse edit, as in the other
WITH_PROMPT = {"prompt": "", "negative": "", "guidance": 7.5, "steps": 100, "weights": TOY}
WITH_EDIT = {"samples": 1, "steps": 50, "weights": TOY_MFX}

# ---------------------------------------------------------------------------------------------------------------------
# The edit


@torch.inference_mode()
def edit(model, prompt, picture=None, change_map=None, *, size=None, repaint=None, negative="", guidance=7.5,
         sampler="ddim", steps=100, seed=0, skip=True, predictions=None):
    """One edited picture; without `picture` and `change_map`, text to image.

    model        of sd.load; it says where and in what precision to compute
    picture      (1, 3, H, W) in [-1, 1]
    change_map   (1, 1, H, W) in [0, 1], 0 = change, 1 = keep
    size         (width, height) in pixels for text to image; None: the model's own
    repaint      (1, 1, H, W), 1 = repaint: for an inpainting model, which is told so at every step
    predictions  a list, filled with (t, the model's guess at the clean latent) as it goes
      ->         (1, 3, H, W) in about [0, 1]
    """
    config = model.vae.config
    width, height = size or (model.size, model.size)
    if picture is not None:
        height, width = picture.shape[-2:]
    shape = (config.latent_channels, height // config.factor, width // config.factor)
    beside = None if repaint is None else model.inpainting_channels(picture, repaint)
    z_init = None if picture is None else model.encode_image(picture)
    sampler = diffusion.make_sampler(sampler, model.schedule, steps)
    denoise = model.denoiser(prompt, negative, guidance, beside, sampler.timesteps)
    return generate(model, denoise, shape, z_init, change_map, sampler, [seed], skip, predictions)


@torch.inference_mode()
def fixup(model, reference, coarse, mask, change_map=None, *, sampler="ddim", steps=50, seeds=(0,), skip=True,
          predictions=None):
    """A coarse edit made into photographs, one for each of `seeds`, in one batch. Arguments as in `edit`, but:

    model              of mfx.load
    reference, coarse  (1, 3, H, W) in [-1, 1]: the picture before the edit; the edit, its holes filled in
    mask               (1, 1, H, W), 1 = content survived the edit, 0 = hole
    change_map         0 = as Magic Fixup has it, 1 = as it is in `coarse`. None: 0 everywhere
      ->               (N, 3, H, W) in about [0, 1]
    """
    # Two papers in four lines. Algorithm 1 starts from the coarse latent under noise, which is Magic Fixup's "latent
    # initialization" (equation 4), so that under a black map it is Magic Fixup, bit for bit.
    I, I_coarse = model.encode_image(reference), model.encode_image(coarse)
    M = diffdiff.down_sample(mask, I.shape[-2:])
    options = {"eta": 1.0} if sampler == "ddim" else {}  # as released
    sampler = diffusion.make_sampler(sampler, model.schedule, steps, **options)
    denoise = model.denoiser(I, I_coarse, M, sampler.timesteps)
    change_map = torch.zeros(1, 1) if change_map is None else change_map
    return generate(model, denoise, I.shape[1:], I_coarse, change_map, sampler, list(seeds), skip, predictions)


def generate(model, denoise, shape, z_init, change_map, sampler, seeds, skip, predictions):
    """What all edits end in: noise (N, *shape) of the seeds, the sampler under the map, the decoder."""
    device = model.vae.quant_conv.weight.device
    noise = torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    noise = noise.to(device)

    def watched(z, t):
        output = denoise(z, t)
        if predictions is not None:
            predictions.append((int(t[0]), model.schedule.convert_output(output.to(z.dtype), z, int(t[0]))[0]))
        return output

    steps = sampler.k
    mu_s = diffdiff.down_sample(change_map.cpu(), shape[1:]) if z_init is not None else torch.zeros(1)
    total = diffdiff.steps_to_run(mu_s, steps) if skip else steps
    with tqdm(total=total, unit="step", leave=False) as bar:
        options = dict(step_noise=diffusion.make_step_noise(shape, seeds), callback=lambda i, z: bar.update())
        if z_init is None:
            z = diffusion.run_sampler(watched, noise, sampler, **options)
        else:
            z_init = z_init.expand_as(noise)
            z = diffdiff.differential_diffusion(watched, z_init, mu_s, sampler, noise, skip=skip, **options)
    x = torch.cat([model.decode(one) for one in z.split(1)]) / 2 + 0.5  # one by one: decoding is what takes most memory
    if not x.isfinite().all():
        single = model.vae.quant_conv.weight.dtype == torch.float32
        why = "are damaged" if single else "overflow in half precision, use --precision fp32"
        raise ValueError(f"the result is not finite: these weights {why}")
    return x


def predictions_strip(model, predictions, columns=8):
    picked = np.linspace(0, len(predictions) - 1, min(columns, len(predictions))).round().astype(int)
    with torch.inference_mode():
        pictures = [tensor_to_picture(model.decode(predictions[i][1][:1])[0] / 2 + 0.5) for i in picked]
    return labelled(pictures, [f"t = {predictions[i][0]}" for i in picked])


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def strengths_of(text):
    """'5' -> five strengths from 0.2 to 1; '0.2,0.5,0.8' -> those."""
    if text.isdecimal():
        n = number(int, 1, 100)(text)
        return [(i + 1) / n for i in range(n)]
    return [number(float, 0, 1)(s) for s in text.split(",")]


def size_of(text):
    """'512' -> 512; '640x384' -> (640, 384)"""
    sides = [number(int, 8, 8192)(s) for s in text.lower().split("x", 1)]
    return tuple(sides) if len(sides) > 1 else sides[0]


def parse(argv):
    p = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--image", help="the picture to edit")
    coarse = p.add_mutually_exclusive_group()
    coarse.add_argument("--edit", metavar="E.png", help="a coarse edit of --image, alpha 0 = holes, for Magic Fixup")
    coarse.add_argument("--collage", metavar="JSON", help="such an edit, written down, of its own picture or --image")
    p.add_argument("--prompt", help="what the edited parts should show")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--change-map", metavar="MAP", help="grey picture: black = change fully, white = keep. Or "
                     f"{maps.RIGHT['depth']}. Or {maps.RIGHT['sam']}")
    how.add_argument("--mask", help="black = repaint, white = keep; blurred by --softness into a change map")
    how.add_argument("--strength-fan", type=strengths_of, metavar="N|LIST", help="columns, or a list: 0.2,0.5,0.8")
    how.add_argument("--strength", type=number(float, 0, 1), help="0 = keep everything, 1 = keep nothing")
    p.add_argument("--softness", type=number(float, 0, 1000), help="blur of --mask, in pixels of --image (default: 40)")
    p.add_argument("--white-is-change", action="store_true", help="the map or mask is white, or 1, where it changes")
    p.add_argument("--segments", choices=["classical", "sam"], help="who resolves a collage's clicks (classical)")
    p.add_argument("--networks", metavar="DIR", help="where the files of SAM and MiDaS are (default: weights)")
    p.add_argument("--samples", type=number(int, 1, 100), metavar="N",
                   help="results of an edit, from seeds SEED .. SEED+N-1, saved as out-SEED.png and so on (default: 1)")
    p.add_argument("--negative", help="what it should not show")
    p.add_argument("--weights", help="a folder, .safetensors or .ckpt (default: the toy)")
    p.add_argument("--prediction", choices=["epsilon", "v_prediction"], help="what a single-file checkpoint predicts")
    p.add_argument("--steps", type=number(int, 1, 1000), help="k of the paper (default: 100; Magic Fixup: 50)")
    p.add_argument("--guidance", type=number(float, 0, 100), help="classifier-free; 1 = none (default: 7.5)")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    p.add_argument("--sampler", choices=list(diffusion.SAMPLERS), default="ddim")
    p.add_argument("--no-skip", action="store_true", help="Algorithm 1: run also the steps that the map overwrites")
    p.add_argument("--size", type=size_of, help="side of a square of equal area, or WxH (default: native)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto")
    p.add_argument("--vae-memory", type=number(float, 0.01, 1000), metavar="GIB", help="of the autoencoder: what would "
                   f"take more goes through it in tiles (default: {vae.MEMORY // 2**30})")
    p.add_argument("--compile", action="store_true", help="compile the UNets first: minutes, for many or large edits")
    p.add_argument("--out", default="out.png")
    p.add_argument("--sheet", metavar="PNG", help="also save input, edit, map and output side by side")
    p.add_argument("--steps-strip", metavar="PNG", help="also save the intermediate predictions")
    return p, p.parse_args(argv)


def check(args):
    """What can be said before anything is read."""

    def given(*names):
        return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]

    read, write = ("image", "edit", "collage", "change_map", "mask"), ("out", "sheet", "steps_strip")
    for name in (*read, *write, "weights", "networks"):
        if getattr(args, name) == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty: give it a name, or leave it out")
    how = given("change_map", "mask", "strength_fan", "strength")
    if fixing := given("edit", "collage"):
        if other := given("prompt", "negative", "guidance", "prediction", "mask", "strength_fan", "strength"):
            raise ValueError(f"{other[0]} does not go with {fixing[0]}: Magic Fixup takes no text, and no map but "
                             "--change-map")
        if args.edit and not args.image:
            raise ValueError("--edit needs the picture that it was made from: --image P.png")
    elif how and not args.image:
        raise ValueError(f"{how[0]} needs a picture: --image P.png")
    elif args.image and not how:
        raise ValueError("say how much of the picture changes: --change-map, --mask, --strength-fan or --strength; or "
                         "what it is to become: --edit or --collage")
    elif not args.image and not args.prompt:
        raise ValueError('say what to draw: --prompt "a red ball on grass at noon"')
    elif args.samples:
        raise ValueError("--samples goes with --edit or --collage")
    if args.softness is not None and not args.mask:
        raise ValueError("--softness blurs a --mask, and there is none")
    if args.white_is_change and not (args.change_map or args.mask):
        raise ValueError("--white-is-change turns a --change-map or --mask round, and there is none")
    if args.no_skip and not (how or fixing):
        raise ValueError("--no-skip runs the steps that a map overwrites, and there is none")
    if args.segments and not args.collage:
        raise ValueError("--segments says who resolves the clicks of a --collage, and there is none")
    if not (maps.parse(args.change_map or "") or args.segments == "sam") and args.networks:
        raise ValueError("--networks is where --change-map depth or sam:... and --segments sam look, and there is none")
    if args.negative and args.guidance == 1:
        raise ValueError("--negative is what --guidance leads away from: with a guidance of 1 it has no effect")
    outputs = [Path(path) for path in (*names(args), args.sheet, args.steps_strip) if path]
    for path in outputs:
        if path.suffix.lower() != ".png":
            raise ValueError(f"{path}: pictures are saved as .png")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path} cannot be written: is {path.parent} a folder that exists and is yours?")
    inputs = [Path(path).resolve() for name in read if (path := getattr(args, name))]
    for i, path in enumerate(outputs):
        if path.resolve() in [*inputs, *(other.resolve() for other in outputs[:i])]:
            raise ValueError(f"{path} would be written over: --out, --sheet and --steps-strip need names of their own")


def names(args):
    """Where the results go: OUT, or with several samples the same with the seed of each before its ending."""
    out = Path(args.out)
    seeds = range(args.seed, args.seed + args.samples) if args.samples else []
    return [out.with_stem(f"{out.stem}-{seed}") for seed in seeds] if len(seeds) > 1 else [out]


def read_inputs(args, dtype, device):
    """-> the picture, RGB; the coarse edit of it, RGBA; the change map or mask over it, (H, W) in [0, 1], 0 = change.
    None where the options name none. The networks that find depth and segments are gone when this returns."""
    original = to_rgb(open_picture(args.image)) if args.image else None
    spec, by_sam = maps.parse(args.change_map or ""), args.segments == "sam"
    kinds = {spec and spec.network, by_sam and "sam"} - {None, False}
    files = {kind: published.find(kind, args.networks or published.FOLDER) for kind in kinds}  # all, before one is run
    load = functools.cache(lambda kind: published.load(kind, files[kind], dtype, device))
    segment_at = sam.segmenter(load("sam")) if by_sam else None
    coarse = mu = None
    if args.edit:
        coarse = open_picture(args.edit)
        if fit_edit(coarse, original, original.size).getchannel("A").getextrema()[0] == 255:
            warnings.warn(f"no holes are marked in {args.edit} (by alpha 0): all of it counts as kept", stacklevel=2)
    elif args.collage:
        made = read_edits(args.collage, segment_at)
        own = Image.fromarray(made.image)
        if original and original.size != own.size:
            sizes = f"{original.width}x{original.height} and the picture in {args.collage} {own.width}x{own.height}"
            raise ValueError(f"{args.image} is {sizes}: its points are in pixels, so both must be of one size")
        original = original or own
        made.image = np.array(original)
        coarse = Image.fromarray(made.coarse())
        fit_edit(coarse, original, own.size)  # raises if nothing is left
    if spec:
        mu = maps.compute(spec, np.asarray(original), load(spec.network), args.white_is_change, segment_at)
    elif (drawn := args.mask if args.change_map is None else args.change_map) is not None:
        mu = map_over(open_picture(drawn), original, args.white_is_change)
    return original, coarse, mu


def map_at(args, mu, original, size):
    """The map or mask over `original`, or a strength's, at `size` (width, height) -> (1, 1, H, W) or None"""
    if mu is None:
        strengths = args.strength_fan or [args.strength]
        return None if strengths == [None] else diffdiff.strength_fan_map(strengths, size[1], size[0])
    mu = map_to_tensor(mu, size)
    if args.change_map:
        return mu
    scale = (size[0] * size[1] / (original.width * original.height)) ** 0.5  # softness is in the original's pixels
    return diffdiff.soft_inpainting_map(mu.round(), (40 if args.softness is None else args.softness) * scale)


def read_model(args, fixing, dtype, device):
    if fixing:
        return mfx.load(args.weights, dtype, device)
    try:
        return sd.load(args.weights, dtype, device, args.prediction)
    except (ValueError, OSError):
        if mfx.recognises(args.weights):
            raise ValueError(f"{args.weights} is a Magic Fixup: it goes with --edit or --collage") from None
        raise


def run(args):
    check(args)
    for name, value in (WITH_EDIT if args.edit or args.collage else WITH_PROMPT).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    original, coarse, mu = read_inputs(args, dtype, device)  # mistakes in them are told before weights are read
    model = read_model(args, coarse, dtype, device)
    make_fast(model, device)
    if (first := diffusion.make_sampler(args.sampler, model.schedule, args.steps).timesteps[0]) < 900:
        warnings.warn(f"{args.steps} steps start at t = {first}, far below full noise: use 10 to 100, or a divisor of "
                      "1000", stacklevel=2)
    if args.vae_memory:
        model.vae.memory = args.vae_memory * 2**30

    size = fitted_size(original or Image.new("L", (8, 8)), args.size or model.size, model.vae.config.factor)
    picture = picture_to_tensor(original, size) if original else None
    change_map = map_at(args, mu, original, size) if original else None
    predictions = [] if args.steps_strip else None
    shown = {}  # on the sheet
    if original:
        shown["reference" if coarse else "input"] = tensor_to_picture(picture[0] / 2 + 0.5)
    if coarse:
        coarse = fit_edit(coarse, original, size)
        shown["coarse edit"] = on_checkerboard(coarse)
        mask = np.asarray(coarse.getchannel("A")) > 0
        filled = Image.fromarray(collage.fill_holes(np.asarray(coarse)[..., :3], ~mask))
        mask = torch.from_numpy(mask).float()[None, None]
        seeds = range(args.seed, args.seed + args.samples)
        make = functools.partial(fixup, model, picture, picture_to_tensor(filled, size), mask, seeds=seeds)
    else:
        seeds, repaint = [args.seed], None
        if model.unet.config.in_channels > model.unet.config.out_channels:
            if not args.mask:
                raise ValueError("these weights are an inpainting model, which needs --image and --mask")
            repaint = (change_map < 0.5).float()
        make = functools.partial(edit, model, args.prompt, picture, size=size, repaint=repaint, negative=args.negative,
                                 guidance=args.guidance, seed=args.seed)
    if args.compile:  # on a short edit; the sizes of the extractor's batches are those of a whole one
        short = args.steps if coarse else min(3, args.steps)
        edit_once = functools.partial(make, torch.zeros(1, 1), sampler=args.sampler, steps=short)
        print(f"compiled in {compile_unets(model, edit_once):.0f} s, with an edit of {short} steps")
    x = make(change_map, sampler=args.sampler, steps=args.steps, skip=not args.no_skip, predictions=predictions)
    if change_map is not None:
        shown["change map"] = tensor_to_picture(change_map[0])

    results = [tensor_to_picture(one) for one in x]
    fan = [f"{s:.2g}" for s in args.strength_fan or []]
    outputs = [labelled_columns(results[0], fan)] if fan else results
    parameters = {k: v for k, v in vars(args).items() if v is not None}
    parameters |= {"weights": str(args.weights), "device": device.type, "precision": str(dtype).removeprefix("torch.")}
    files = [(output, path, parameters | {"seed": s}) for output, path, s in zip(outputs, names(args), seeds)]
    if args.sheet:
        labels = [f"seed {s}" for s in seeds] if coarse else [args.prompt]
        files.append((labelled([*shown.values(), *results], [*shown, *labels]), args.sheet, parameters))
    if predictions:
        files.append((predictions_strip(model, predictions), args.steps_strip, parameters))
    elif predictions is not None:
        warnings.warn("no --steps-strip: a white map needs no step", stacklevel=2)
    save_pictures(files)
    for output, path, parameters in files[: len(outputs)]:
        what = f"{output.width}x{output.height}, seed {parameters['seed']}, {args.sampler} in {args.steps} steps"
        print(f"{path}: {what}, {device.type} in {parameters['precision']}")


def main(argv=None):
    parser, args = parse(argv)
    warnings.showwarning = lambda message, *_: print(f"{parser.prog}: warning: {message}", file=sys.stderr)
    with report_errors(parser, "try a smaller --size, or half precision"):
        run(args)


if __name__ == "__main__":
    hold_memory()
    main()
