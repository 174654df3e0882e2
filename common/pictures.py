"""Pictures in and out: any file that Pillow reads -> tensors that fit a model, and tensors -> PNG files.

A change map, a mask or a coarse edit is drawn over a whole picture. All of them are cut and resampled as that picture
is, so that what lies over each other in the files does so in the tensors.
"""

import contextlib
import json

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from common.files import atomic_write

# ---------------------------------------------------------------------------------------------------------------------
# In


def open_picture(path):
    """Any file that Pillow reads, turned upright. ValueError, in one line, for anything else."""
    try:
        with Image.open(path) as file:
            file.load()
            return ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except Exception as e:  # a damaged file can fail in any way
        raise ValueError(f"{path} is not a picture that can be read ({e})") from None


def to_rgb(picture):
    """RGB; what is transparent shows white."""
    picture = deep_to_8_bit(picture)
    if picture.has_transparency_data:
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


def check_aspect(picture, original, what):
    if abs(picture.width / picture.height / (original.width / original.height) - 1) > 0.02:
        sizes = f"the {what} is {picture.width}x{picture.height} and the picture {original.width}x{original.height}"
        raise ValueError(f"{sizes}: it must show the whole picture, in the same aspect ratio")


def map_over(picture, original, white_is_change=False):
    """A change map or mask, drawn over `original` -> (H, W) in [0, 1], 0 = change: a value for each of its pixels."""
    check_aspect(picture, original, "map")
    over = to_rgb(picture).convert("L").resize(original.size, Image.Resampling.BOX)
    grey = torch.from_numpy(np.asarray(over, np.float32) / 255)
    return 1 - grey if white_is_change else grey


def map_to_tensor(mu, size):
    """A map (H, W) over a picture's pixels -> (1, 1, h, w) at `size` (width, height), fitted as the picture is."""
    return torch.from_numpy(np.array(ImageOps.fit(Image.fromarray(mu.numpy()), size, Image.Resampling.BOX)))[None, None]


def fit_edit(picture, original, size):
    """A coarse edit of `original`, alpha 0 = holes -> RGBA at `size` (width, height), alpha 0 or 255, fitted as the
    picture is. ValueError if nothing is left of the picture."""
    check_aspect(picture, original, "edit")
    over = deep_to_8_bit(picture).convert("RGBA")
    if over.size != original.size:
        over = over.resize(original.size, Image.Resampling.LANCZOS)
    # Pillow weights the colours of RGBA by alpha when it resamples, so whatever colour a hole has does not bleed.
    over = ImageOps.fit(over, size, Image.Resampling.LANCZOS)
    kept = over.getchannel("A").point(lambda a: 255 * (a > 127))
    if not kept.getbbox():
        raise ValueError("the edit is transparent everywhere: alpha 0 marks the holes, and there is nothing else in it")
    over.putalpha(kept)
    return over


# ---------------------------------------------------------------------------------------------------------------------
# Out


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
        label = " ".join(label.split())  # in one line
        sheet.paste(picture, (x, bar))
        while draw.textlength(label, font) > picture.width and len(label) > 4:
            label = label[:-4] + "..."
        draw.text((x + picture.width / 2, bar / 2), label, "black", font, anchor="mm")
        x += picture.width + gap
    return sheet


def labelled_columns(picture, labels):
    """The picture under a bar with a label over each of as many columns of equal width."""
    edges = np.arange(len(labels) + 1) * picture.width // len(labels)
    columns = [picture.crop((a, 0, b, picture.height)) for a, b in zip(edges[:-1], edges[1:])]
    return labelled(columns, labels, gap=0)


def on_checkerboard(picture):
    """RGBA -> RGB; what is transparent shows a checkerboard, about 16 squares to a side."""
    n = max(1, round(max(picture.size) / 16))
    y, x = np.indices(picture.size[::-1]) // n
    board = Image.fromarray(np.where((x + y) % 2, 255, 190).astype(np.uint8)).convert("RGBA")
    return Image.alpha_composite(board, picture).convert("RGB")


def save_picture(picture, path, parameters):
    """Whole or not at all, with the parameters in a text chunk."""
    save_pictures([(picture, path, parameters)])


def save_pictures(pictures):
    """(picture, path, parameters) of each: only once all of them are written do they get their names."""
    with contextlib.ExitStack() as written:
        for picture, path, parameters in pictures:
            note = PngImagePlugin.PngInfo()
            note.add_text("parameters", json.dumps(parameters))
            picture.save(written.enter_context(atomic_write(path)), "PNG", pnginfo=note)
