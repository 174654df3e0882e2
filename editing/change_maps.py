"""Change maps that are computed, not drawn: Differential Diffusion, section 3.3.2, Figures 14, 16.

A few characters, the map's *spec*, stand where a map's file could:

    depth                            MiDaS's inverse depth: the nearest stays, the farthest changes
    depth:invert,gamma=2,quantize=4  the same, transformed from left to right: invert,
                                     gamma=EXPONENT, window=LOW-HIGH, equalize, quantize=LEVELS
    sam:310,200=0;50,80=0.4          the segment at each click (x, y in pixels) has that value, a
                                     later one's over an earlier one's; the rest is kept
    sam:310,200=1;rest=0.2           and here the rest has this value
    sam:0,0.3,0.6                    Segment Anything's automatic masks: the largest has the first
                                     value, the next the second, a smaller one's over a larger one's

Values are as in the map: 0 = change fully, 1 = keep. `depth`, `sam`, and what begins so before a
colon is always a spec, whatever lies on the disk: a file of such a name is ./depth.
"""

import re
import warnings
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

from networks import midas, sam
from networks.automask import automatic_masks

# -------------------------------------------------------------------------------------------------
# Transforms of a map: Figure 14
#
# The paper says "simple histogram transformations", and not which. These take a map of any shape in
# [0, 1] to another, pixel by pixel, one after another. Only invert changes the order of pixels.


def depth_to_map(inverse_depth):
    """Stretched to [0, 1]: the nearest stays, the farthest changes. At one distance all stays."""
    low, high = inverse_depth.min(), inverse_depth.max()
    if low == high:
        return torch.ones_like(inverse_depth)
    return (inverse_depth - low) / (high - low)


def invert(mu):
    """The nearest changes, the farthest stays."""
    return 1 - mu


def gamma(mu, exponent):
    """Above 1 more of the picture changes, below 1 less; the ends stay where they are."""
    if not exponent > 0:
        raise ValueError(f"gamma's exponent is above 0, not {exponent:g}")
    return mu**exponent


def window(mu, low, high):
    """Below `low` all changes, above `high` nothing does, and the whole scale lies between them."""
    if not low < high:
        raise ValueError(f"a window is from a lower value to a higher one, not {low:g} to {high:g}")
    return ((mu - low) / (high - low)).clamp(0, 1)


def equalize(mu):
    """Every strength gets the same area: a value becomes the share of the picture below it,
    stretched to [0, 1]. Equal values stay equal, and a map of one value stays as it is."""
    values, which, count = mu.unique(return_inverse=True, return_counts=True)
    if len(values) == 1:
        return mu
    below = count.cumsum(0) - count  # pixels; from 0 for the lowest value
    return (below / below[-1]).to(mu.dtype)[which]


def quantize(mu, levels):
    """`levels` strengths, 0 and 1 among them, each for an equal range of values."""
    if levels < 2:
        raise ValueError(f"a change map has two levels or more, not {levels}")
    return (mu * levels).floor().clamp(max=levels - 1) / (levels - 1)


NUMBER = r"(\d+\.?\d*|\.\d+)"  # not below 0
TRANSFORMS = {  # name: the function, what follows the name in a spec, what kind of numbers it is
    "invert": (invert, "", None),
    "gamma": (gamma, f"={NUMBER}", float),
    "window": (window, f"={NUMBER}-{NUMBER}", float),
    "equalize": (equalize, "", None),
    "quantize": (quantize, r"=(\d{1,3})", int),
}

# -------------------------------------------------------------------------------------------------
# Specs


RIGHT = {
    "depth": "depth, or depth: and some of invert,gamma=2,window=0.2-0.8,equalize,quantize=4",
    "sam": "sam:X,Y=V;X,Y=V;rest=V for clicks, or sam:V,V,V for the largest masks, V in 0 .. 1 "
           "(0 = change, 1 = keep)",
}


class Spec(NamedTuple):
    network: str  # as published.load names it: "midas", or "sam" with either clicks or values
    transforms: tuple = ()  # (name, arguments), in this order
    clicks: tuple = ()  # (x, y, value)
    values: tuple = ()  # of automatic masks, from the largest on
    rest: float | None = None  # what no segment covers; None: kept


def parse_spec(text):
    """The text of --change-map -> Spec; None for a file's name. ValueError for a malformed spec."""
    kind, colon, rest = text.partition(":")
    if kind not in RIGHT:
        return None
    parts = [part.strip() for part in rest.split(";" if "=" in rest and kind == "sam" else ",")]
    try:
        if kind == "depth":
            return Spec("midas", tuple(map(parse_transform, parts if colon else [])))
        if "=" not in rest:
            return Spec("sam", values=tuple(map(parse_value, parts)))
        clicks, others = [], []
        for part in parts:
            place, _, value = (side.strip() for side in part.partition("="))
            if place == "rest":
                others.append(parse_value(value))
            else:
                clicks.append((*parse_point(place), parse_value(value)))
        if not clicks or len(others) > 1:
            raise ValueError("there is one click or more, and at most one rest")
        return Spec("sam", clicks=tuple(clicks), rest=others[0] if others else None)
    except ValueError as e:
        raise ValueError(f"change map {text!r}: {e}; say {RIGHT[kind]}") from None


def parse_transform(text):
    """'window=0.2-0.8' -> ('window', (0.2, 0.8))"""
    for name, (transform, pattern, kind) in TRANSFORMS.items():
        found = re.fullmatch(name + pattern, text)
        if found:
            arguments = tuple(map(kind, found.groups()))
            transform(torch.zeros(1), *arguments)  # raises where they make no sense
            return name, arguments
    raise ValueError(f"{text!r} is no transform")


def parse_point(text):
    """'310,200' -> (310.0, 200.0)"""
    found = re.fullmatch(rf"{NUMBER}\s*,\s*{NUMBER}", text)
    if not found:
        raise ValueError(f"{text!r} is no point X,Y in pixels")
    return float(found[1]), float(found[2])


def parse_value(text):
    if not re.fullmatch(NUMBER, text) or float(text) > 1:
        raise ValueError(f"{text!r} is no value in 0 .. 1")
    return float(text)


# -------------------------------------------------------------------------------------------------
# Maps


def compute_map(spec, image, model, white_is_change=False, segment_at=None):
    """The map that a spec asks for -> (H, W) float32 in [0, 1], 0 = change, on the CPU

    image            (H, W, 3) uint8
    model            the network that the spec names: midas.DPT or sam.SAM
    white_is_change  the spec's values are meant the other way round, 1 = change fully. What it
                     does not mention is kept all the same; with depth, the nearest changes
    segment_at       sam.segmenter(model), where there is one, which may know the picture already

    ValueError: a click outside the picture, or at which there is nothing; no automatic masks; a
    network that overflows in half precision.
    """
    if spec.network == "midas":
        depth = midas.depth(model, image)
        if not depth.isfinite().all():
            raise ValueError("the depth is not finite: this network overflows in half precision, "
                             "use --precision fp32")
        mu = depth_to_map(depth)
        for name, arguments in spec.transforms:
            transform, *_ = TRANSFORMS[name]
            mu = transform(mu, *arguments)
        return 1 - mu if white_is_change else mu
    if spec.clicks:
        points = [(x, y) for x, y, _ in spec.clicks]
        values = [value for *_, value in spec.clicks]
        masks = segments_at(points, image, segment_at or sam.segmenter(model))
    else:
        values = spec.values
        masks = largest_segments(len(values), image, model)
    kept = 0.0 if white_is_change else 1.0
    mu = torch.full(image.shape[:2], kept if spec.rest is None else spec.rest)
    for mask, value in zip(masks, values):
        mu[torch.from_numpy(mask)] = value
    return 1 - mu if white_is_change else mu


def segments_at(points, image, segment_at):
    """The segment at each point (x, y), one after the other: (H, W) bool"""
    H, W = image.shape[:2]
    for x, y in points:  # all of them, before the network looks at the first
        if not (x < W and y < H):
            raise ValueError(f"the click {x:g},{y:g} is outside the picture of {W}x{H}")
    for x, y in points:
        mask = segment_at(image, (x, y))
        if not mask.any():
            raise ValueError(f"there is nothing at the click {x:g},{y:g}: try another point")
        yield mask


def largest_segments(n, image, model):
    """The n largest automatic masks, or all if they are fewer, the largest first: (H, W) bool

    They are drawn and compared at the network's own size, and only these n are enlarged: the same
    masks of a photo of 12 megapixels for a fraction of the time and memory.
    """
    H, W = image.shape[:2]
    scale = min(1, model.config.size / max(H, W))
    h, w = (max(1, int(side * scale + 0.5)) for side in (H, W))
    seen = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
    records = sorted(automatic_masks(model, seen), key=lambda record: -record["area"])
    if not records:
        raise ValueError("Segment Anything finds no masks here by itself: click them, sam:X,Y=V")
    if len(records) < n:
        found = f"Segment Anything finds only {len(records)} masks"
        warnings.warn(f"there are {n} values, and {found}", stacklevel=2)
    for record in records[:n]:
        mask = record["segmentation"].astype(np.float32)
        yield cv2.resize(mask, (W, H), interpolation=cv2.INTER_LINEAR) > 0.5
