"""--paste-back: the photograph's own pixels, wherever the map keeps them in full, at its own size.

The papers do not do this: all that they give back has gone through the autoencoder, at the model's size. Here a small
copy of the photograph is edited, and the result is laid over the photograph where the map says that something changes.
"""

import numpy as np
import torch
from PIL import Image, ImageCms

from common.colours import colour_transform, from_srgb, to_srgb
from common.pictures import fit_edit

FEATHER = 0.25  # up to this strength photograph and result are mixed: so weak an edit doubles nothing


def prepare(original, coarse, change_map, size):
    """The same at `size` (width, height), for the model: the whole photograph, nothing cut. And how to paste.

    original    RGB
    coarse      RGBA over it: then it is what the map keeps, but for its holes. Or None
    change_map  (1, 1, H, W) over the original's pixels, 1 = keep
      ->        original, coarse, change map (1, 1, h, w), over_photo: a result, sRGB, at `size` -> RGB, at the
                photograph's size, with its colour profile
    """
    mu = change_map[0, 0].numpy()
    weight = 1 - mu
    weight /= FEATHER  # in place: the photograph may be large
    weight *= 255
    weight = weight.round(out=weight).clip(0, 255, out=weight).astype(np.uint8)
    photo = original
    if coarse:
        coarse = fit_edit(coarse, original, original.size)
        weight[np.asarray(coarse.getchannel("A")) == 0] = 255  # a hole has nothing to keep
        photo = coarse.convert("RGB")  # with the edit's own profile
        coarse = coarse.resize(size, Image.Resampling.LANCZOS)
    try:
        colour_transform(photo.info.get("icc_profile"), "RGB", back=True)
    except (ImageCms.PyCMSError, OSError):  # some lead to sRGB, and not from there; some are damaged
        photo = to_srgb(photo)
    small = original.resize(size, Image.Resampling.LANCZOS)
    mu = Image.fromarray(mu).resize(size, Image.Resampling.BOX)
    weight = Image.fromarray(weight)  # 0 = the photograph, 255 = the result

    def over_photo(result):
        result = from_srgb(result, photo.info.get("icc_profile"))
        pasted = Image.composite(result.resize(photo.size, Image.Resampling.LANCZOS), photo, weight)
        pasted.info = result.info
        return pasted

    return small, coarse, torch.from_numpy(np.array(mu))[None, None], over_photo
