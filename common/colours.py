"""Colour profiles: what a file's numbers mean, told in sRGB, which models have learned."""

import functools
import io
import warnings

import numpy as np
from PIL import Image, ImageCms


@functools.lru_cache(maxsize=16)
def colour_transform(profile, mode, back=False):
    """Pillow's transform from a file's profile, bytes, and a picture's mode to sRGB; or back.

    None where there is no profile of such colours, where it is sRGB to one level of 255, and, with
    a warning, where it cannot be followed. Back: ImageCms.PyCMSError or OSError where it
    cannot be followed that way.
    """
    spaces = {"RGB": b"RGB ", "RGBA": b"RGB ", "L": b"GRAY", "CMYK": b"CMYK"}
    if not profile or profile[16:20] != spaces[mode]:
        return None
    made = mode if mode == "RGBA" else "RGB"
    how = {"renderingIntent": ImageCms.Intent.RELATIVE_COLORIMETRIC,
           "flags": ImageCms.Flags.BLACKPOINTCOMPENSATION}
    srgb = ImageCms.createProfile("sRGB")
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(own, srgb, mode, made, **how)
    except (ImageCms.PyCMSError, OSError) as e:
        if back:
            raise
        warnings.warn(f"a colour profile cannot be followed ({e}): its colours count as sRGB",
                      stacklevel=2)
        return None
    if back:
        back = ImageCms.buildTransform(srgb, own, made, mode, **how)

    # Most cameras embed sRGB itself. Then the numbers stay what they are
    levels = np.arange(0, 256, 15, np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    colours = Image.fromarray(colours).convert(mode)
    seen = ImageCms.applyTransform(colours, transform)
    change = np.asarray(seen.convert("RGB"), int) - np.asarray(colours.convert("RGB"), int)
    if np.abs(change).max() <= 1:
        return None
    return back or transform


def to_srgb(picture):
    """RGB or RGBA, by the profile in its .info, which ends here -> sRGB"""
    transform = colour_transform(picture.info.get("icc_profile"), picture.mode)
    picture = ImageCms.applyTransform(picture, transform) if transform else picture.copy()
    picture.info.pop("icc_profile", None)
    return picture


def from_srgb(picture, profile):
    """RGB in sRGB -> in the colours of a profile, bytes or None, which goes along."""
    transform = colour_transform(profile, "RGB", back=True)
    picture = ImageCms.applyTransform(picture, transform) if transform else picture.copy()
    picture.info = {"icc_profile": profile} if profile and profile[16:20] == b"RGB " else {}
    return picture
