"""Change maps that are computed rather than drawn: Differential Diffusion, section 3.3.2 and Figures 14 and 16.

What a map is made of is said in a few characters, its *spec*, which stands where a map's file could:

    depth                              MiDaS's inverse depth: the nearest stays, the farthest changes
    depth:invert,gamma=2,quantize=4    the same, then transformed from left to right: invert, gamma=EXPONENT,
                                       window=LOW-HIGH, equalize, quantize=LEVELS
    sam:310,200=0;50,80=0.4            what Segment Anything sees at a click (x, y in pixels) has that value, a later
                                       click's over an earlier one's; the rest is kept
    sam:310,200=1;rest=0.2             and here it is not
    sam:0,0.3,0.6                      of its automatic masks, the largest has the first value, the next the second, and
                                       so on, a smaller one's over a larger one's; the rest is kept

Values are as in the map: 0 = change fully, 1 = keep. What is `depth` or `sam`, or begins so before a colon, is always a
spec and never a file, whatever lies on the disk: a file of such a name is ./depth.
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

# ---------------------------------------------------------------------------------------------------------------------
# Transforms of a map: Figure 14
#
# The paper says "simple histogram transformations", and not which. These take a map of any shape within [0, 1], 0 =
# change and 1 = keep, to another, pixel by pixel, so that they can be applied one after another; none but invert
# changes the order of two pixels.


def change_map(inverse_depth):
    """Stretched to [0, 1]: the nearest stays, the farthest changes. All at one distance: all stays."""
    low, high = inverse_depth.min(), inverse_depth.max()
    return (inverse_depth - low) / (high - low) if high > low else torch.ones_like(inverse_depth)


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
        raise ValueError(f"a window goes from a lower value to a higher one, not from {low:g} to {high:g}")
    return ((mu - low) / (high - low)).clamp(0, 1)


def equalize(mu):
    """Histogram equalization: a value becomes the share of the picture that is below it, stretched to [0, 1].

    Every strength gets the same area, however the distances are spread. Equal values stay equal; a map of one value
    stays as it is.
    """
    values, which, count = mu.unique(return_inverse=True, return_counts=True)
    if len(values) == 1:
        return mu
    below = count.cumsum(0) - count  # pixels; from 0 for the lowest value
    return (below / below[-1]).to(mu.dtype)[which]


def quantize(mu, levels):
    """`levels` strengths, 0 and 1 among them, each for an equal range of values: strata of distance."""
    if levels < 2:
        raise ValueError(f"a change map has two levels or more, not {levels}")
    return (mu * levels).floor().clamp(max=levels - 1) / (levels - 1)


TRANSFORMS = {"invert": invert, "gamma": gamma, "window": window, "equalize": equalize, "quantize": quantize}


# ---------------------------------------------------------------------------------------------------------------------
# Specs


class Spec(NamedTuple):
    network: str  # as checkpoints/published.py names it: "midas", or "sam" with either clicks or values
    transforms: tuple = ()  # (name, arguments), in this order
    clicks: tuple = ()  # (x, y, value)
    values: tuple = ()  # of automatic masks, from the largest on
    rest: float | None = None  # what no segment covers; None: kept


N = r"(\d+\.?\d*|\.\d+)"  # a number, not below 0
STEPS = {  # what follows a transform's name, and what kind of numbers these are
    "invert": ("", None), "gamma": (f"={N}", float), "window": (f"={N}-{N}", float), "equalize": ("", None),
    "quantize": (r"=(\d{1,3})", int),
}
RIGHT = {
    "depth": "depth, or depth: and some of invert,gamma=2,window=0.2-0.8,equalize,quantize=4",
    "sam": "sam:X,Y=V;X,Y=V;rest=V for clicks, or sam:V,V,V for the largest masks, V in 0 .. 1 (0 = change, 1 = keep)",
}


def parse(text):
    """The text of --change-map -> Spec, or None if it names a file. ValueError, in one line, for a malformed spec."""
    kind, colon, rest = text.partition(":")
    if kind not in RIGHT:
        return None
    try:
        if kind == "depth":
            return Spec("midas", tuple(transform(part.strip()) for part in rest.split(",")) if colon else ())
        if "=" not in rest:
            return Spec("sam", values=tuple(value(part.strip()) for part in rest.split(",")))
        pairs = [[side.strip() for side in part.partition("=")[::2]] for part in rest.split(";")]
        clicks = tuple((*point(place), value(v)) for place, v in pairs if place != "rest")
        others = [value(v) for place, v in pairs if place == "rest"]
        if not clicks or len(others) > 1:
            raise ValueError("there is one click or more, and at most one rest")
        return Spec("sam", clicks=clicks, rest=others[0] if others else None)
    except ValueError as e:
        raise ValueError(f"change map {text!r}: {e}; say {RIGHT[kind]}") from None


def transform(text):
    """'window=0.2-0.8' -> ('window', (0.2, 0.8))"""
    for name, (pattern, number) in STEPS.items():
        if found := re.fullmatch(name + pattern, text):
            arguments = tuple(map(number, found.groups()))
            TRANSFORMS[name](torch.zeros(1), *arguments)  # raises where they make no sense
            return name, arguments
    raise ValueError(f"{text!r} is no transform")


def point(text):
    """'310,200' -> (310.0, 200.0)"""
    if not (found := re.fullmatch(rf"{N}\s*,\s*{N}", text)):
        raise ValueError(f"{text!r} is no point X,Y in pixels")
    return float(found[1]), float(found[2])


def value(text):
    if not re.fullmatch(N, text) or float(text) > 1:
        raise ValueError(f"{text!r} is no value in 0 .. 1")
    return float(text)


# ---------------------------------------------------------------------------------------------------------------------
# Maps


def compute(spec, image, model, white_is_change=False, segment_at=None):
    """The map that a spec asks for -> (H, W) float32 in [0, 1], 0 = change, on the CPU

    image            (H, W, 3) uint8
    model            the network that the spec names: midas.DPT or sam.SAM
    white_is_change  the spec's values are meant the other way round, 1 = change fully. What it does not mention is
                     kept all the same; with depth, it is the nearest that changes
    segment_at       a sam.segmenter of this model, if there is one, which may have seen the picture already

    ValueError, in one line: a click outside the picture, or at which there is nothing; no automatic masks; a network
    that overflows in half precision.
    """
    if spec.network == "midas":
        depth = midas.depth(model, image)
        if not depth.isfinite().all():
            raise ValueError("the depth is not finite: this network overflows in half precision, use --precision fp32")
        mu = change_map(depth)
        for name, arguments in spec.transforms:
            mu = TRANSFORMS[name](mu, *arguments)
        return 1 - mu if white_is_change else mu
    if spec.clicks:
        masks = clicked(image, [(x, y) for x, y, _ in spec.clicks], segment_at or sam.segmenter(model))
        values = [v for *_, v in spec.clicks]
    else:
        masks, values = largest(len(spec.values), image, model), spec.values
    mu = torch.full(image.shape[:2], float(not white_is_change) if spec.rest is None else spec.rest)
    for mask, v in zip(masks, values):
        mu[torch.from_numpy(mask)] = v
    return 1 - mu if white_is_change else mu


def clicked(image, points, segment_at):
    """The segment at each point (x, y), one after the other: (H, W) bool"""
    H, W = image.shape[:2]
    for x, y in points:  # all of them, before the network looks at the first
        if not (x < W and y < H):
            raise ValueError(f"the click {x:g},{y:g} is outside the picture of {W}x{H}")
    for x, y in points:
        mask = segment_at(image, (x, y))
        if not mask.any():
            raise ValueError(f"Segment Anything sees nothing at the click {x:g},{y:g}: try another point")
        yield mask


def largest(n, image, model):
    """The n largest automatic masks, or all if they are fewer, the largest first: (H, W) bool

    SAM sees a picture at its own size. There all candidates are drawn and compared, and only these n are enlarged: the
    same masks of a photo of 12 megapixels for a fraction of the time and memory.
    """
    H, W = image.shape[:2]
    scale = min(1, model.config.size / max(H, W))
    h, w = (max(1, int(side * scale + 0.5)) for side in (H, W))
    seen = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))  # as by SAM.encode
    records = sorted(automatic_masks(model, seen), key=lambda record: -record["area"])
    if not records:
        raise ValueError("Segment Anything finds no masks in this picture by itself: click them, sam:X,Y=V")
    if len(records) < n:
        warnings.warn(f"there are {n} values, and Segment Anything finds only {len(records)} masks", stacklevel=2)
    for record in records[:n]:
        mask = record["segmentation"].astype(np.float32)
        yield cv2.resize(mask, (W, H), interpolation=cv2.INTER_LINEAR) > 0.5
