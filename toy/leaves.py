"""Pictures that are nobody's, with the statistics of photographs, for an autoencoder to learn from.

Dead leaves (Lee, Mumford & Huang 2001, "Occlusion models for natural images"): shapes of every size lie on each
other. It gives edges at all scales and a spectrum of about 1/f^2. Each leaf has a colour, a gradient
and a texture of its own; some pictures carry strokes like writing, some are out of focus, some are grey.
"""

import cv2
import numpy as np
import torch

FINER = 2  # drawn at so many times the resolution, then averaged: edges have no steps
LEAVES = 120
SMALLEST, LARGEST = 0.02, 0.6  # radii, of the picture's side


def dead_leaves(n, size, generator):
    """-> (n, 3, size, size) in [0, 1], a function of the generator's state"""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    rng = np.random.default_rng(seed)
    pictures = np.stack([draw_leaves(size, rng) for _ in range(n)])
    return torch.from_numpy(pictures.clip(0, 1).astype(np.float32)).permute(0, 3, 1, 2).contiguous()


def draw_leaves(size, rng):
    """-> (size, size, 3), about 0 .. 1"""
    side = size * FINER
    leaf = np.zeros((side, side), np.float32)
    radius = 1 / rng.uniform(1 / LARGEST, 1 / SMALLEST, LEAVES)  # density r^-2
    centre = rng.uniform(-0.1, 1.1, (LEAVES, 2))
    straight = rng.random() < 0.5  # a picture's shapes are round, or some have corners
    for i in range(1, LEAVES):
        if straight and i % 2:
            cv2.fillPoly(leaf, [polygon(centre[i] * side, radius[i] * side, rng)], i)
        else:
            axes = np.maximum(1, radius[i] * side * rng.uniform(0.4, 1, 2)).astype(int)
            cv2.ellipse(leaf, (centre[i] * side).astype(int), axes, rng.uniform(0, 180), 0, 360, i, -1)
    if rng.random() < 0.3:
        write(leaf, LEAVES, rng)
    leaf = leaf.astype(int)

    # Per leaf: a colour, a gradient across the picture, how much there is of a texture
    brightness = rng.uniform(0.1, 0.9) + rng.uniform(0.05, 0.4) * rng.standard_normal((LEAVES + 1, 1))
    hue = 0.2 * rng.standard_normal(3) + rng.uniform(0, 0.25) * rng.standard_normal((LEAVES + 1, 3))
    colour = brightness + hue
    if rng.random() < 0.2:
        colour[:] = colour.mean(1, keepdims=True)
    slope = 0.4 * rng.standard_normal((LEAVES + 1, 2, 1))
    rough = rng.choice([0.0, 0.02, 0.06, 0.15], LEAVES + 1) * rng.random()
    ramp = np.linspace(-1, 1, side)[:, None]
    light = slope[leaf, 0] * ramp[:, :, None] * 0.5 + slope[leaf, 1] * ramp[None] * 0.5
    picture = colour[leaf] * (1 + light) + rough[leaf][..., None] * coloured_noise(side, rng)[..., None]
    picture = cv2.resize(picture.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    if rng.random() < 0.25:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.5, 2.5))
    return picture


def polygon(centre, radius, rng):
    angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
    return (centre + radius * np.stack([np.cos(angle), np.sin(angle)], 1)).astype(np.int32)


def write(leaf, ink, rng):
    """Rows of strokes in place, like writing or thin branches."""
    side = len(leaf)
    for _ in range(rng.integers(5, 60)):
        start, steps = rng.uniform(0, side, 2), rng.normal(0, side * rng.choice([0.03, 0.1]), (4, 2))
        cv2.polylines(leaf, [(start + steps.cumsum(0)).astype(np.int32)], False, ink, int(rng.integers(1, 4)))


def coloured_noise(side, rng):
    """-> (side, side), unit variance, of a spectrum between white and 1/f"""
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) + 1 / side
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) * f ** -rng.uniform(0, 1.5)
    noise = np.fft.irfft2(spectrum, (side, side))
    return noise / noise.std()
