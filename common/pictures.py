"""Pictures in and out: any file that Pillow reads -> tensors that fit a model; tensors -> files.

A change map, a mask or a coarse edit is drawn over a whole picture. It is cut and resampled as
that picture is, so that what lies over each other in the files does so in the tensors.

A picture of RGB keeps its file's own numbers and, in .info, its colour profile, for as long as it
is large. What a model or a network sees of it is sRGB. A map's greys are numbers, not colours.
"""

import contextlib
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from common.colours import colour_transform, to_srgb
from common.files import atomic_write

# What people have is opened: scans and phones of 200 megapixels, a PNG whose text is a workflow.
# What would not fit into a computer's memory is not: an edit takes up to 18 bytes a pixel, 5 GB.
PIXELS = 2**28
Image.MAX_IMAGE_PIXELS = PIXELS // 2  # Pillow refuses what has twice as many, and warns before
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes, unpacked; of colour profiles as well
PngImagePlugin.MAX_TEXT_MEMORY = 2**28
STRIP = 1024  # rows: what is made of a whole picture is made in strips, for the memory between

# What is saved, by a file's ending: Pillow's name, pixels on a side at most, how well
KINDS = {
    ".png": ("PNG", 2**31 - 1, {}),
    ".jpg": ("JPEG", 65500, {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", 65500, {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", 16383, {"quality": 95}),
}

SEVERAL = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # formats that may hold a film, or pages

Image.init()
READ = sorted(set(Image.OPEN) - {"EPS", "WMF"})  # those are programs, which others would have to run

# Looked for in turn where Pillow's own font, of ASCII, lacks a letter: Linux, Windows, macOS
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "wqy-microhei.ttc",
         "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "unifont.otf", "arial.ttf", "msyh.ttc",
         "YuGothM.ttc", "msgothic.ttc", "malgun.ttf", "simsun.ttc", "Arial Unicode.ttf",
         "Hiragino Sans GB.ttc", "PingFang.ttc", "AppleSDGothicNeo.ttc")

# -------------------------------------------------------------------------------------------------
# Files to pictures


def open_picture(path):
    """Any file that Pillow reads by itself, turned upright. ValueError, one line, for others."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(path, formats=READ)
        with file:
            if file.format in SEVERAL and file.is_animated:
                warnings.warn(f"{path} has more than one frame, or page: the first is taken", stacklevel=2)
            ImageOps.exif_transpose(file, in_place=True)
            if file.mode in ("P", "PA") and file.palette is None:
                raise ValueError("its palette is missing")
            if not isinstance(file.info.get("icc_profile"), bytes):  # a damaged TIFF's is a number
                file.info.pop("icc_profile", None)
            return file
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except Image.DecompressionBombError:
        most = f"more than {PIXELS // 10**6} megapixels, for which memory may not suffice"
        raise ValueError(f"{path} has {most}: save it smaller") from None
    except Exception as e:  # a damaged file can fail in any way
        raise ValueError(f"{path} is not a picture that can be read ({e})") from None


def to_rgb(picture):
    """RGB; what is transparent shows white. A profile of RGB stays in .info, with the
    file's own numbers. Those of grey and of CMYK are followed, to sRGB."""
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return picture
    warn_of_black(picture)
    return in_strips(lambda strip: lay_on(read_colours(strip), "white"), picture, "RGB")


def to_rgba(picture):
    """RGBA, otherwise as to_rgb."""
    warn_of_black(picture)
    return in_strips(lambda strip: read_colours(strip).convert("RGBA"), picture, "RGBA")


def warn_of_black(picture):
    high = np.asarray(picture).max() if picture.mode.startswith("I") else 0
    if 0 < high <= 255:
        name = getattr(picture, "filename", "") or "a picture"
        warnings.warn(f"{name} is nearly black: it has mode {picture.mode}, in which white is 65535, and "
                      f"nothing above {high}. If 255 is its white, save it with 8 bits", stacklevel=3)


def map_to_grey(picture, white_is_change=False):
    """L; what is transparent in a map is kept. The greys are numbers: no profile is followed."""
    kept = "black" if white_is_change else "white"
    return in_strips(lambda strip: lay_on(deep_to_8_bit(strip), kept).convert("L"), picture, "L")


def in_strips(convert, picture, mode):
    """convert(strip), of that mode, for strip after strip of a picture -> the whole"""
    whole = Image.new(mode, picture.size)
    for top in range(0, picture.height, STRIP):
        box = (0, top, picture.width, min(top + STRIP, picture.height))
        strip = picture.crop(box)
        strip.filename = getattr(picture, "filename", "")  # for an error
        whole.paste(convert(strip), box)
    profile = picture.info.get("icc_profile") or b""
    if profile[16:20] == b"RGB " and picture.mode != "CMYK":
        whole.info["icc_profile"] = profile
    return whole


def read_colours(picture):
    """-> RGBA where something may be transparent, RGB otherwise"""
    profile = picture.info.get("icc_profile")
    picture = deep_to_8_bit(picture)
    made = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    plain = picture.convert("L") if picture.mode in ("1", "LA") else picture
    if plain.mode in ("L", "CMYK"):
        transform = colour_transform(profile, plain.mode)
        if transform:
            colours = ImageCms.applyTransform(plain, transform)
            if made.mode == "RGBA":
                colours.putalpha(made.getchannel("A"))
            made = colours
    return made


def lay_on(picture, beneath):
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        background = Image.new("RGBA", picture.size, beneath)
        picture = Image.alpha_composite(background, picture)
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
        which = f"{getattr(picture, 'filename', '') or 'a picture'}, of mode {mode},"
        values = f"values in 0 .. {full}, not {low:g} .. {high:g}"
        raise ValueError(f"{which} should have {values}: save it with 8 bits per channel")
    grey = Image.fromarray((x / full * 255).round().astype(np.uint8))
    if "transparency" in picture.info:  # one of its tones, of which several become one of these
        grey.putalpha(Image.fromarray(np.uint8(255) * (x != picture.info["transparency"])))
    return grey


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
    """-> (1, 3, H, W) in [-1, 1], sRGB, that covers `size` (width, height), cut in the middle."""
    picture = to_srgb(ImageOps.fit(to_rgb(picture), size, Image.Resampling.LANCZOS))
    x = np.asarray(picture, np.float32)
    return torch.from_numpy(x / 127.5 - 1).permute(2, 0, 1)[None]


def check_aspect(picture, original, what):
    ratio = picture.width / picture.height / (original.width / original.height)
    if abs(ratio - 1) > 0.02:
        sizes = "the {} is {}x{} and the picture {}x{}".format(what, *picture.size, *original.size)
        raise ValueError(f"{sizes}: it must show the whole picture, in the same aspect ratio")


def map_over(picture, original, white_is_change=False):
    """A map or mask, drawn over `original` -> (H, W) in [0, 1], 0 = change: one value per pixel."""
    check_aspect(picture, original, "map")
    grey = map_to_grey(picture, white_is_change).resize(original.size, Image.Resampling.BOX)
    mu = torch.from_numpy(np.array(grey, np.float32)).div_(255)
    return mu.neg_().add_(1) if white_is_change else mu


def map_to_tensor(mu, size):
    """A map (H, W) over a picture's pixels -> (1, 1, h, w) at `size` (width, height)."""
    if (mu.shape[1], mu.shape[0]) == tuple(size):
        return mu[None, None]
    fitted = ImageOps.fit(Image.fromarray(mu.numpy()), size, Image.Resampling.BOX)
    return torch.from_numpy(np.array(fitted))[None, None]


def fit_edit(picture, original, size):
    """A coarse edit of `original` -> RGBA at `size` (width, height), alpha 0 = holes, 255 = kept.

    ValueError if it is transparent everywhere, or has another aspect ratio.
    """
    check_aspect(picture, original, "edit")
    over = to_rgba(picture)
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
    sheet = Image.new("RGB", (width, bar + max(p.height for p in pictures)), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for picture, label in zip(pictures, labels):
        sheet.paste(picture, (x, bar))
        label = " ".join(label.split())[:300]  # in one line
        font = find_font(label, bar * 0.7)
        if font is None:
            warnings.warn(f"no font here has all letters of {label!r}: that label is left out",
                          stacklevel=2)
            label, font = "", find_font("", bar * 0.7)
        while draw.textlength(label, font) > picture.width and len(label) > 4:
            label = label[:-4] + "..."
        draw.text((x + picture.width / 2, bar / 2), label, "black", font, anchor="mm")
        x += picture.width + gap
    return sheet


def enlarge(picture, least=256):
    """A small picture, to be looked at: a whole number of times as large, by Lanczos, until its
    longer side has `least` pixels."""
    times = -(-least // max(picture.size))
    if times == 1:
        return picture
    return picture.resize((times * picture.width, times * picture.height), Image.Resampling.LANCZOS)


def find_font(text, size):
    """The first font that draws all of the text; None if no font here does."""
    for name in (None, *FONTS):
        try:
            font = ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
        except OSError:
            continue
        unknown = bytes(font.getmask("\U0010ffff"))  # the box, or nothing, that stands for it
        if all(bytes(font.getmask(letter)) != unknown for letter in set(text) - {" "}):
            return font
    return None


def labelled_columns(picture, labels):
    """The picture under a bar with a label over each of as many columns of equal width."""
    edges = np.arange(len(labels) + 1) * picture.width // len(labels)
    columns = [picture.crop((a, 0, b, picture.height)) for a, b in zip(edges[:-1], edges[1:])]
    sheet = labelled(columns, labels, gap=0)
    sheet.info["icc_profile"] = picture.info.get("icc_profile")  # its numbers are the picture's own
    return sheet


def on_checkerboard(picture):
    """RGBA -> RGB; what is transparent shows a checkerboard, about 16 squares to a side."""
    side = max(1, round(max(picture.size) / 16))
    y, x = np.indices(picture.size[::-1]) // side
    board = Image.fromarray(np.where((x + y) % 2, 255, 190).astype(np.uint8)).convert("RGBA")
    return Image.alpha_composite(board, picture).convert("RGB")


def save_picture(picture, path, parameters):
    """Whole or not at all, with the parameters in it: PNG, JPEG or WebP by the name's ending."""
    save_pictures([(picture, path, parameters)])


def save_pictures(pictures):
    """(picture, path, parameters) of each. They get their names once all of them are written."""
    with contextlib.ExitStack() as written:
        for picture, path, parameters in pictures:
            kind, side, options = KINDS[Path(path).suffix.lower()]
            if max(picture.size) > side:  # a sheet of very many
                picture = ImageOps.contain(picture, (side, side))
            note = json.dumps(parameters)
            if kind == "PNG":
                options = {"pnginfo": PngImagePlugin.PngInfo()}
                options["pnginfo"].add_text("parameters", note)
            else:
                exif = Image.Exif()  # in a JPEG it has 64 kB
                comment = b"ASCII\0\0\0" + note[:60000].encode()
                exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
                options = options | {"exif": exif, "icc_profile": picture.info.get("icc_profile")}
            picture.save(written.enter_context(atomic_write(path)), kind, **options)
