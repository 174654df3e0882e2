"""Pictures and masks that several tests share."""

import functools
import struct

import numpy as np
from PIL import ImageCms


def noise(H=40, W=48, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


def smooth(H=64, W=64):
    y, x = np.mgrid[:H, :W] / max(H, W)
    return (127 + 100 * np.stack([np.sin(5 * x + y), np.cos(4 * y), np.sin(3 * x - 4 * y)], 2)).astype(np.uint8)


def box(H, W, x0, y0, x1, y1):
    mask = np.zeros((H, W), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def disc(H, W, x, y, r):
    return np.hypot(*np.ogrid[0.5 - y : H - y, 0.5 - x : W - x]) < r


@functools.cache  # a profile has the time in it
def swapped_profile():
    """A profile of RGB whose first number is green and whose second is red"""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"xXYZ").replace(b"gXYZ", b"rXYZ").replace(b"xXYZ", b"gXYZ")


def grey_profile(gamma=2.4):
    """A profile of grey, sRGB's own curve but for the exponent"""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exponent, other = (struct.pack(">i", round(g * 65536)) for g in (2.4, gamma))
    return profile.replace(b"RGB ", b"GRAY", 1).replace(b"rTRC", b"kTRC").replace(exponent, other)
