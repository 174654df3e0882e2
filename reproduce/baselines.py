"""Pasting an edit into its original: what Differential Diffusion's soft-inpainting is compared with, Figures 6 and 12.

All take original and edited (H, W, 3) uint8 and return the like. mu (H, W) in [0, 1] is a change map, 1 = the original.
"""

import cv2
import numpy as np


def alpha(original, edited, mu):
    """Each pixel a mixture of both."""
    mixed = mu[..., None] * original + (1 - mu[..., None]) * edited.astype(np.float64)
    return mixed.round().astype(np.uint8)


def poisson(original, edited, mu):
    """Pérez et al. 2003: the edit's gradients inside, the original's colours at the rim. Inside is where mu < 1/2, but
    for the picture's outermost pixels, which are the rim there."""
    inside = (mu < 0.5).astype(np.uint8) * 255
    inside[[0, 1, -2, -1]] = inside[:, [0, 1, -2, -1]] = 0
    if not inside.any():
        return original.copy()
    x, y, w, h = cv2.boundingRect(inside)
    return cv2.seamlessClone(edited, original, inside, (x + w // 2, y + h // 2), cv2.NORMAL_CLONE)


def laplace(original, edited, mu):
    """Burt & Adelson 1983: each band of frequencies is mixed by a map as smooth as the band."""
    levels = max(1, int(np.log2(min(mu.shape))) - 2)
    a, b, m = (np.asarray(x, np.float32) for x in (original, edited, mu))
    bands = []  # finest first
    for _ in range(levels):
        smaller = [cv2.pyrDown(x) for x in (a, b, m)]
        size = m.shape[::-1]
        bands.append(m[..., None] * (a - cv2.pyrUp(smaller[0], dstsize=size))
                     + (1 - m[..., None]) * (b - cv2.pyrUp(smaller[1], dstsize=size)))
        a, b, m = smaller
    out = m[..., None] * a + (1 - m[..., None]) * b
    for band in reversed(bands):
        out = cv2.pyrUp(out, dstsize=band.shape[1::-1]) + band
    return out.round().clip(0, 255).astype(np.uint8)
