"""Pictures in and out: any file that Pillow reads -> tensors that fit a model; tensors -> PNG.

A change map, a mask or a coarse edit is drawn over a whole picture. It is cut and resampled as
that picture is, so that what lies over each other in the files does so in the tensors.
"""

import contextlib
import json

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from common.files import atomic_write

# -------------------------------------------------------------------------------------------------
# Files to pictures


def open_picture(path):
    """Any file that Pillow reads, turned upright. ValueError, one line, for anything else."""
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
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def deep_to_8_bit(picture):
    """16-bit and floating-point grey -> 8-bit grey. Pillow itself clips them to white or black."""
    mode = picture.mode
    if not mode.startswith(("I", "F")):
        return picture
    x = np.asarray(picture, np.float32)
    low, high = x.min(), x.max()
    full = 65535 if mode.startswith("I") else 1
    if not (np.isfinite(x).all() and 0 <= low and high <= full):
        values = f"values in 0 .. {full}, not {low:g} .. {high:g}"
        raise ValueError(f"a picture of mode {mode} has {values}")
    return Image.fromarray((x / full * 255).round().astype(np.uint8))


# -------------------------------------------------------------------------------------------------
# Pictures, and what is drawn over them, to tensors


def fitted_size(picture, size, factor):
    """-> (width, height) in multiples of `factor`: about size x size pixels in the picture's
    aspect, square without a picture; or `size` itself, where it is a pair."""
    if isinstance(size, tuple):
        width, height = size
    else:
        width, height = picture.size if picture else (1, 1)
        scale = size / (width * height) ** 0.5
        width, height = width * scale, height * scale
    return tuple(max(factor, round(side / factor) * factor) for side in (width, height))


def picture_to_tensor(picture, size):
    """-> (1, 3, H, W) in [-1, 1] that covers `size` (width, height), cut in the middle."""
    x = np.asarray(ImageOps.fit(to_rgb(picture), size, Image.Resampling.LANCZOS), np.float32)
    return torch.from_numpy(x / 127.5 - 1).permute(2, 0, 1)[None]


def check_aspect(picture, original, what):
    ratio = picture.width / picture.height / (original.width / original.height)
    if abs(ratio - 1) > 0.02:
        sizes = "the {} is {}x{} and the picture {}x{}".format(what, *picture.size, *original.size)
        raise ValueError(f"{sizes}: it must show the whole picture, in the same aspect ratio")


def map_over(picture, original, white_is_change=False):
    """A map or mask, drawn over `original` -> (H, W) in [0, 1], 0 = change: one value per pixel."""
    check_aspect(picture, original, "map")
    over = to_rgb(picture).convert("L").resize(original.size, Image.Resampling.BOX)
    grey = torch.from_numpy(np.asarray(over, np.float32) / 255)
    return 1 - grey if white_is_change else grey


def map_to_tensor(mu, size):
    """A map (H, W) over a picture's pixels -> (1, 1, h, w) at `size` (width, height)."""
    fitted = ImageOps.fit(Image.fromarray(mu.numpy()), size, Image.Resampling.BOX)
    return torch.from_numpy(np.array(fitted))[None, None]


def fit_edit(picture, original, size):
    """A coarse edit of `original` -> RGBA at `size` (width, height), alpha 0 = holes, 255 = kept.

    ValueError if it is transparent everywhere, or has another aspect ratio.
    """
    check_aspect(picture, original, "edit")
    over = deep_to_8_bit(picture).convert("RGBA")
    if over.size != original.size:
        over = over.resize(original.size, Image.Resampling.LANCZOS)
    # Pillow weights the colours of RGBA by alpha when it resamples: a hole's colour does not bleed
    over = ImageOps.fit(over, size, Image.Resampling.LANCZOS)
    kept = over.getchannel("A").point(lambda alpha: 255 * (alpha > 127))
    if not kept.getbbox():
        raise ValueError("the edit is transparent everywhere: its alpha 0 marks holes")
    over.putalpha(kept)
    return over


# -------------------------------------------------------------------------------------------------
# Tensors to pictures, and pictures to files


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
        label = " ".join(label.split())  # in one line
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
    side = max(1, round(max(picture.size) / 16))
    y, x = np.indices(picture.size[::-1]) // side
    board = Image.fromarray(np.where((x + y) % 2, 255, 190).astype(np.uint8)).convert("RGBA")
    return Image.alpha_composite(board, picture).convert("RGB")


def save_picture(picture, path, parameters):
    """Whole or not at all, with the parameters in a text chunk."""
    save_pictures([(picture, path, parameters)])


def save_pictures(pictures):
    """(picture, path, parameters) of each. They get their names once all of them are written."""
    with contextlib.ExitStack() as written:
        for picture, path, parameters in pictures:
            note = PngImagePlugin.PngInfo()
            note.add_text("parameters", json.dumps(parameters))
            picture.save(written.enter_context(atomic_write(path)), "PNG", pnginfo=note)
