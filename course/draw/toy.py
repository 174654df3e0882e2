"""What the figures show: the toy model, made fast, and the pictures that the pages speak of."""

import functools

import torch

import sd
from common.cli import TOY
from common.devices import make_fast
from common.pictures import map_over, open_picture, picture_to_tensor

EXAMPLES = TOY.parent.parent / "examples"


@functools.cache
def load_toy():
    """The shipped Stable Diffusion, on the CPU"""
    return make_fast(sd.load(TOY), torch.device("cpu"))


def read_picture(name="meadow.png"):
    """A picture of examples/ -> (1, 3, 128, 128) in [-1, 1]"""
    return picture_to_tensor(open_picture(EXAMPLES / name), (128, 128))


def read_map(name="gradient.png"):
    """A change map of examples/, drawn over the meadow -> (128, 128) in [0, 1], 0 = change"""
    return map_over(open_picture(EXAMPLES / name), open_picture(EXAMPLES / "meadow.png"))


def draw_noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
