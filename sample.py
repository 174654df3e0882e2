"""Edit a picture from the command line, each pixel by as much as you say.

    python sample.py --image P.png --change-map M.png --prompt "snow at night"    black changes fully, white stays
    python sample.py --image P.png --mask M.png --softness 8 --prompt "..."       soft-inpainting: black is repainted
    python sample.py --image P.png --strength-fan 5 --prompt "..."                columns of growing strength
    python sample.py --image P.png --strength 0.6 --prompt "..."                  one strength everywhere (SDEdit)
    python sample.py --prompt "..."                                               text to image

Maps and masks are black where the picture changes and white where it is kept, as in the Differential Diffusion paper;
--white-is-change takes them the other way round, as many other tools draw them. Without --weights the toy model runs
that this project trained and ships; --weights takes any Stable Diffusion 1.x or 2.x: a folder, .safetensors or .ckpt.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from tqdm import tqdm

import diffdiff
import diffusion
import layouts
import sd

TOY = Path(__file__).parent / "weights" / "toy"

# ---------------------------------------------------------------------------------------------------------------------
# Pictures in and out


def open_picture(path):
    """Any file that Pillow reads, turned upright. ValueError, in one line, for anything else."""
    try:
        with Image.open(path) as file:
            file.load()
            return ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ValueError(f"{path} is not a picture that can be read ({e})") from None


def to_rgb(picture):
    """RGB; what is transparent shows white."""
    picture = deep_to_8_bit(picture)
    if "transparency" in picture.info or picture.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def deep_to_8_bit(picture):
    """16-bit and floating-point grey as 8-bit grey: Pillow's own conversion would clip them to white or black."""
    if not picture.mode.startswith(("I", "F")):
        return picture
    x = np.asarray(picture, np.float32)
    full = 65535 if picture.mode.startswith("I") else 1
    if not (np.isfinite(x).all() and 0 <= x.min() and x.max() <= full):
        raise ValueError(f"a picture of mode {picture.mode} has values in 0 .. {full}, not {x.min():g} .. {x.max():g}")
    return Image.fromarray((x / full * 255).round().astype(np.uint8))


def fitted_size(picture, size, factor):
    """(width, height) in multiples of `factor`: the picture's aspect and about size x size pixels; or `size` itself."""
    if isinstance(size, tuple):
        width, height = size
    else:
        scale = size / (picture.width * picture.height) ** 0.5
        width, height = picture.width * scale, picture.height * scale
    return tuple(max(factor, round(x / factor) * factor) for x in (width, height))


def picture_to_tensor(picture, size):
    """-> (1, 3, H, W) in [-1, 1]; covers `size` (width, height), cut in the middle where the aspect differs."""
    x = np.asarray(ImageOps.fit(to_rgb(picture), size, Image.Resampling.LANCZOS), np.float32)
    return torch.from_numpy(x / 127.5 - 1).permute(2, 0, 1)[None]


def map_to_tensor(picture, original, size, white_is_change=False):
    """A change map or mask, drawn over `original` -> (1, 1, H, W) in [0, 1], 0 = change, fitted as the picture is."""
    if abs(picture.width / picture.height / (original.width / original.height) - 1) > 0.02:
        sizes = f"the map is {picture.width}x{picture.height} and the picture {original.width}x{original.height}"
        raise ValueError(f"{sizes}: draw the map over the whole picture, in the same aspect ratio")
    over = to_rgb(picture).convert("L").resize(original.size, Image.Resampling.BOX)
    grey = np.asarray(ImageOps.fit(over, size, Image.Resampling.BOX), np.float32) / 255
    return torch.from_numpy(1 - grey if white_is_change else grey)[None, None]


def tensor_to_picture(x):
    """(3, H, W) or (1, H, W) in [0, 1] -> picture"""
    x = (x.float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(x.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy())


def labelled(pictures, labels, gap=2):
    """Pictures side by side, under a bar with a label over each."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    bar = max(14, pictures[0].height // 12)
    font = ImageFont.load_default(bar * 0.7)
    sheet = Image.new("RGB", (width, bar + max(p.height for p in pictures)), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for picture, label in zip(pictures, labels):
        sheet.paste(picture, (x, bar))
        while draw.textlength(label, font) > picture.width and len(label) > 4:
            label = label[:-4] + "..."
        draw.text((x + picture.width / 2, bar / 2), label, "black", font, anchor="mm")
        x += picture.width + gap
    return sheet


def save_picture(picture, path, parameters):
    """Whole or not at all, with the parameters in a text chunk."""
    note = PngImagePlugin.PngInfo()
    note.add_text("parameters", json.dumps(parameters))
    with layouts.whole(path) as tmp:
        picture.save(tmp, "PNG", pnginfo=note)


# ---------------------------------------------------------------------------------------------------------------------
# Where and how to compute


def choose_device(name):
    if name != "auto":
        try:
            if torch.device(name).type not in ("cpu", "cuda", "mps"):
                raise RuntimeError("choose auto, cpu, cuda or mps")
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"--device {name} cannot be used here ({str(e).splitlines()[0]})") from None
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(name, device):
    """Half precision where the hardware multiplies matrices in it faster than in single precision."""
    if name != "auto":
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float16
    # bf16 instructions without AMX tiles (AVX512-BF16 alone) are slower than single precision: python bench.py unet
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


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
    device, vae = next(model.unet.parameters()).device, model.vae.config
    width, height = picture.shape[:1:-1] if picture is not None else size or (model.size, model.size)
    shape = (vae.latent_channels, height // vae.factor, width // vae.factor)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)).to(device)
    known = None
    if repaint is not None:  # what an inpainting model sees beside z: mask, and latent of the picture without that part
        seen = model.encode_image(picture * (1 - repaint))
        known = torch.cat([diffdiff.down_sample(repaint, shape[1:]).round().to(device), seen], dim=1)
    denoise = model.denoiser(prompt, negative, guidance, known)

    def watched(z, t):
        output = denoise(z, t)
        if predictions is not None:
            predictions.append((int(t[0]), model.schedule.x0_eps(output.to(z.dtype), z, int(t[0]))[0]))
        return output

    sampler = diffusion.make(sampler, model.schedule, steps)
    if steps > 100 and sampler.timesteps[0] < 900:
        warnings.warn(f"{steps} steps start at t = {sampler.timesteps[0]}, far below full noise: use up to 100, or a "
                      "divisor of 1000", stacklevel=2)
    if picture is None:
        mu_s = torch.zeros(1)
    else:
        z_init, mu_s = model.encode_image(picture), diffdiff.down_sample(change_map.cpu(), shape[1:])
    total = diffdiff.steps_to_run(mu_s, steps) if skip else steps
    with tqdm(total=total, unit="step", leave=False) as bar:
        options = dict(step_noise=diffusion.step_noise(shape, [seed]), callback=lambda i, z: bar.update())
        if picture is None:
            z = diffusion.sample(watched, noise, sampler, **options)
        else:
            z = diffdiff.differential_diffusion(watched, z_init, mu_s, sampler, noise, skip=skip, **options)
    x = model.decode(z) / 2 + 0.5
    if not x.isfinite().all():
        raise ValueError("the result is not finite: these weights overflow in half precision, use --precision fp32")
    return x


def predictions_strip(model, predictions, columns=8):
    picked = np.linspace(0, len(predictions) - 1, min(columns, len(predictions))).round().astype(int)
    with torch.inference_mode():
        pictures = [tensor_to_picture(model.decode(predictions[i][1])[0] / 2 + 0.5) for i in picked]
    return labelled(pictures, [f"t = {predictions[i][0]}" for i in picked])


def strengths_of(text):
    """'5' -> five strengths from 0.2 to 1; '0.2,0.5,0.8' -> those."""
    try:
        values = [float(s) for s in text.split(",")]
        if text.isdecimal() and 1 <= values[0] <= 100:
            return [(i + 1) / int(text) for i in range(int(text))]
        if not text.isdecimal() and all(0 <= s <= 1 for s in values):
            return values
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number of columns, nor strengths in 0 .. 1 like 0.2,0.5,0.8")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high):
    def read(text):
        try:
            if low <= (value := kind(text)) <= high:
                return value
        except ValueError:
            pass
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} in {low} .. {high}")

    return read


def size_of(text):
    try:
        sides = [int(s) for s in text.lower().split("x")]
        if not 1 <= len(sides) <= 2 or not all(8 <= s <= 8192 for s in sides):
            raise ValueError
        return sides[0] if len(sides) == 1 else tuple(sides)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in pixels like 512 or 640x384") from None


def parse(argv):
    p = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--image", help="the picture to edit")
    p.add_argument("--prompt", default="", help="what the edited parts should show")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--change-map", metavar="MAP", help="grey picture: black = change fully, white = keep")
    how.add_argument("--mask", help="black = repaint, white = keep; blurred by --softness into a change map")
    how.add_argument("--strength-fan", type=strengths_of, metavar="N|LIST", help="columns, or a list: 0.2,0.5,0.8")
    how.add_argument("--strength", type=number(float, 0, 1), help="0 = keep everything, 1 = keep nothing")
    p.add_argument("--softness", type=number(float, 0, 1000), help="blur of --mask, in pixels of --image (default: 40)")
    p.add_argument("--white-is-change", action="store_true", help="the map or mask is white where it changes")
    p.add_argument("--negative", default="", help="what it should not show")
    p.add_argument("--weights", default=TOY, help="a folder, .safetensors or .ckpt (default: the toy)")
    p.add_argument("--prediction", choices=["epsilon", "v_prediction"], help="what a single-file checkpoint predicts")
    p.add_argument("--steps", type=number(int, 1, 1000), default=100, help="k of the paper (default: 100)")
    p.add_argument("--guidance", type=number(float, 0, 100), default=7.5, help="classifier-free guidance; 1 = none")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0)
    p.add_argument("--sampler", choices=list(diffusion.SAMPLERS), default="ddim")
    p.add_argument("--no-skip", action="store_true", help="Algorithm 1: run also the steps that the map overwrites")
    p.add_argument("--size", type=size_of, help="side of a square of equal area, or WxH (default: native)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto")
    p.add_argument("--out", default="out.png")
    p.add_argument("--sheet", metavar="PNG", help="also save input, map and output side by side")
    p.add_argument("--steps-strip", metavar="PNG", help="also save the intermediate predictions")
    return p, p.parse_args(argv)


def check(args):
    """What can be said before anything is read."""
    how = [o for o in ("change_map", "mask", "strength_fan", "strength") if getattr(args, o) is not None]
    if how and not args.image:
        raise ValueError(f"--{how[0].replace('_', '-')} needs a picture: --image P.png")
    if args.image and not how:
        raise ValueError("say how much of the picture changes: --change-map, --mask, --strength-fan or --strength")
    if not args.image and not args.prompt:
        raise ValueError('say what to draw: --prompt "a red ball on grass at noon"')
    if args.softness is not None and not args.mask:
        raise ValueError("--softness blurs a --mask, and there is none")
    if args.white_is_change and not (args.change_map or args.mask):
        raise ValueError("--white-is-change turns a --change-map or --mask round, and there is none")
    if args.negative and args.guidance == 1:
        raise ValueError("--negative is what --guidance leads away from: with a guidance of 1 it has no effect")
    outputs = [Path(path) for path in (args.out, args.sheet, args.steps_strip) if path]
    for path in outputs:
        if path.suffix.lower() != ".png":
            raise ValueError(f"{path}: pictures are saved as .png")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path} cannot be written: is {path.parent} a folder that exists and is yours?")
    if len(set(outputs)) < len(outputs):
        raise ValueError("--out, --sheet and --steps-strip need names of their own")


def read_map(args, original, size):
    """The change map that the options ask for, over `original`, at `size` (width, height) -> (1, 1, H, W)"""
    if args.strength_fan or args.strength is not None:
        return diffdiff.strength_fan_map(args.strength_fan or [args.strength], size[1], size[0])
    drawn = map_to_tensor(open_picture(args.change_map or args.mask), original, size, args.white_is_change)
    if args.change_map:
        return drawn
    scale = (size[0] * size[1] / (original.width * original.height)) ** 0.5  # softness is in the original's pixels
    return diffdiff.soft_inpainting_map(drawn.round(), (40 if args.softness is None else args.softness) * scale)


def run(args):
    check(args)
    original = to_rgb(open_picture(args.image)) if args.image else None
    if original:
        read_map(args, original, original.size)  # a map that does not fit is told before the weights are read
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)
    model = sd.load(args.weights, dtype, device, args.prediction)

    size = fitted_size(original or Image.new("L", (8, 8)), args.size or model.size, model.vae.config.factor)
    picture = change_map = repaint = None
    if original:
        picture, change_map = picture_to_tensor(original, size), read_map(args, original, size)
    if model.unet.config.in_channels > model.unet.config.out_channels:
        if not args.mask:
            raise ValueError("these weights are an inpainting model, which needs --image and --mask")
        repaint = (change_map < 0.5).float()
    predictions = [] if args.steps_strip else None
    x = edit(model, args.prompt, picture, change_map, size=size, repaint=repaint, negative=args.negative,
             guidance=args.guidance, sampler=args.sampler, steps=args.steps, seed=args.seed, skip=not args.no_skip,
             predictions=predictions)

    result = output = tensor_to_picture(x[0])
    if args.strength_fan:
        edges = np.arange(len(args.strength_fan) + 1) * size[0] // len(args.strength_fan)
        columns = [result.crop((a, 0, b, size[1])) for a, b in zip(edges[:-1], edges[1:])]
        output = labelled(columns, [f"{s:.2g}" for s in args.strength_fan], gap=0)
    parameters = {k: v for k, v in vars(args).items() if v is not None}
    parameters |= {"weights": str(args.weights), "device": device.type, "precision": str(dtype).removeprefix("torch.")}
    save_picture(output, args.out, parameters)
    if args.sheet:
        shown = [tensor_to_picture(picture[0] / 2 + 0.5), tensor_to_picture(change_map[0])] if original else []
        labels = ["input", "change map"][: len(shown)] + [args.prompt]
        save_picture(labelled([*shown, result], labels), args.sheet, parameters)
    if predictions:
        save_picture(predictions_strip(model, predictions), args.steps_strip, parameters)
    elif predictions is not None:
        warnings.warn("no --steps-strip: a white map needs no step", stacklevel=2)
    what = f"{output.width}x{output.height}, seed {args.seed}, {args.sampler} in {args.steps} steps"
    print(f"{args.out}: {what}, {device.type} in {parameters['precision']}")


def main(argv=None):
    parser, args = parse(argv)
    warnings.showwarning = lambda message, *_: print(f"{parser.prog}: warning: {message}", file=sys.stderr)
    try:
        run(args)
    except (ValueError, OSError) as e:
        parser.error(e)
    except RuntimeError as e:
        if "memory" not in str(e):
            raise
        parser.error("out of memory: try a smaller --size, or half precision")


if __name__ == "__main__":
    main()
