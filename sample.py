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
    if "transparency" in picture.info or picture.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return deep_to_8_bit(picture).convert("RGB")


def deep_to_8_bit(picture):
    """16-bit grey as 8-bit grey: Pillow's own conversion would clip it to white."""
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture, np.float32) / 257).clip(0, 255).astype(np.uint8))
    return picture


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
    grey = np.asarray(ImageOps.fit(to_rgb(picture).convert("L"), size, Image.Resampling.BOX), np.float32) / 255
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
    # AVX512-BF16 without AMX tiles is slower than single precision in oneDNN's convolutions: measured, see README.
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# The edits


def edit(model, args, picture, change_map, device):
    """-> the edited picture (1, 3, H, W) in [0, 1], and the intermediate predictions [(step, latent)]"""
    sampler = diffusion.make(args.sampler, model.schedule, args.steps)
    factor = model.vae.config.factor
    shape = (1, model.vae.config.latent_channels, args.height // factor, args.width // factor)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(device)
    with torch.inference_mode():
        if picture is not None:
            z_init = model.encode_image(picture.to(device))
            mu_s = diffdiff.down_sample(change_map, shape[-2:]).to(device)
        known = inpainting_channels(model, picture, change_map, device)
        denoise = model.denoiser([args.prompt], args.negative, args.guidance, known)

        predictions = []

        def watched(z, t):  # the model's guess at the clean picture, as it goes
            output = denoise(z, t)
            if args.steps_strip:
                predictions.append((int(t[0]), model.schedule.x0_eps(output.to(z.dtype), z, int(t[0]))[0]))
            return output

        step_noise = diffusion.step_noise(shape[1:], [args.seed])
        skip = picture is not None and not args.no_skip
        total = round((1 - mu_s.min().item()) * args.steps) if skip else args.steps
        with tqdm(total=total, desc=args.sampler, unit="step", leave=False) as bar:
            options = dict(step_noise=step_noise, callback=lambda i, z: bar.update())
            if picture is None:
                z = diffusion.sample(watched, noise, sampler, **options)
            else:
                z = diffdiff.differential_diffusion(watched, z_init, mu_s, sampler, noise, skip=skip, **options)
        return model.decode(z) / 2 + 0.5, predictions


def inpainting_channels(model, picture, change_map, device):
    """What a 9-channel model sees beside z: the mask (1 = repaint), and the latent of the picture without that part."""
    if model.unet.config.in_channels != 9:
        return None
    if picture is None:
        raise ValueError("these weights are an inpainting model, which needs --image and --mask or --change-map")
    repaint = (change_map < 0.5).float().to(device)
    latent = model.encode_image(picture.to(device) * (1 - repaint))
    return torch.cat([diffdiff.down_sample(repaint, latent.shape[-2:]).round(), latent], dim=1)


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
    p.add_argument("--softness", type=number(float, 0, 1000), default=40, help="blur of --mask, in pixels of --image")
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


def run(args):
    needs_image = [o for o in ("change_map", "mask", "strength_fan", "strength") if getattr(args, o) is not None]
    if needs_image and not args.image:
        raise ValueError(f"--{needs_image[0].replace('_', '-')} needs a picture: --image P.png")
    if args.image and not needs_image:
        raise ValueError("say how much of the picture changes: --change-map, --mask, --strength-fan or --strength")
    if not args.image and not args.prompt:
        raise ValueError('say what to draw: --prompt "a red ball on grass at noon"')
    for path in filter(None, (args.out, args.sheet, args.steps_strip)):
        if not path.lower().endswith(".png"):
            raise ValueError(f"{path}: pictures are saved as .png")
        if not Path(path).parent.is_dir():
            raise ValueError(f"{path}: the folder {Path(path).parent} does not exist")

    original = to_rgb(open_picture(args.image)) if args.image else None
    drawn = open_picture(args.change_map or args.mask) if args.change_map or args.mask else None
    strengths = args.strength_fan
    device = choose_device(args.device)
    model = sd.load(args.weights, choose_precision(args.precision, device), device, args.prediction)

    size = args.size or model.size
    factor = model.vae.config.factor
    args.width, args.height = fitted_size(original or Image.new("L", (8, 8)), size, factor)
    picture = change_map = None
    if original:
        picture = picture_to_tensor(original, (args.width, args.height))
        if args.mask:
            scale = (args.width * args.height / (original.width * original.height)) ** 0.5
            mask = map_to_tensor(drawn, original, (args.width, args.height), args.white_is_change).round()
            change_map = diffdiff.soft_inpainting_map(mask, args.softness * scale)
        elif args.change_map:
            change_map = map_to_tensor(drawn, original, (args.width, args.height), args.white_is_change)
        else:
            change_map = diffdiff.strength_fan_map(strengths or [args.strength], args.height, args.width)

    x, predictions = edit(model, args, picture, change_map, device)
    output = tensor_to_picture(x[0])
    if strengths:
        columns = np.arange(len(strengths) + 1) * args.width // len(strengths)
        output = labelled(
            [output.crop((a, 0, b, args.height)) for a, b in zip(columns[:-1], columns[1:])],
            [f"{s:.2g}" for s in strengths], gap=0,
        )

    parameters = {k: v for k, v in vars(args).items() if v is not None} | {"weights": str(args.weights)}
    save_picture(output, args.out, parameters)
    if args.sheet:
        shown = [tensor_to_picture(picture[0] / 2 + 0.5), tensor_to_picture(change_map[0])] if original else []
        labels = ["input", "change map"][: len(shown)] + [args.prompt]
        save_picture(labelled([*shown, tensor_to_picture(x[0])], labels), args.sheet, parameters)
    if args.steps_strip and predictions:
        save_picture(predictions_strip(model, predictions), args.steps_strip, parameters)
    size = f"{output.width}x{output.height}"
    print(f"{args.out}: {size}, seed {args.seed}, {args.sampler} in {args.steps} steps, {device.type}")


def main(argv=None):
    parser, args = parse(argv)
    warnings.showwarning = lambda message, *_: print(f"{parser.prog}: warning: {message}", file=sys.stderr)
    try:
        run(args)
    except (ValueError, OSError) as e:
        parser.error(e)
    except torch.OutOfMemoryError:
        parser.error("out of memory: try a smaller --size, or --precision fp16")


if __name__ == "__main__":
    main()
