"""What the figures show: the toy models, made fast, what they attend to, and the pictures that the pages speak of."""

import functools

import torch

import mfx
import sd
from common.cli import TOY, TOY_MFX
from common.devices import make_fast
from common.pictures import map_over, open_picture, picture_to_tensor

EXAMPLES = TOY.parent.parent / "examples"


@functools.cache
def load_toy():
    """The shipped Stable Diffusion, on the CPU"""
    return make_fast(sd.load(TOY), torch.device("cpu"))


@functools.cache
def load_toy_mfx():
    """The shipped Magic Fixup, on the CPU"""
    return make_fast(mfx.load(TOY_MFX), torch.device("cpu"))


def watch_attention(unet, run):
    """Run one picture through `unet` -> {number of the block: (N, M), how much each of N tokens looks at each of the M
    keys of its second attention, mean over the heads}"""
    found, hooks = {}, []
    for block in unet.transformer_blocks():
        def record(attention, inputs, output, index=block.index):
            x, (keys, _) = inputs  # (1, N, width), (1, heads, M, d)
            q = attention.split_heads(attention.to_q(x))
            found[index] = (q @ keys.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)[0]
        hooks.append(block.attn2.register_forward_hook(record))
    run()
    for hook in hooks:
        hook.remove()
    return found


def read_picture(name="meadow.png"):
    """A picture of examples/ -> (1, 3, 128, 128) in [-1, 1]"""
    return picture_to_tensor(open_picture(EXAMPLES / name), (128, 128))


def read_map(name="gradient.png"):
    """A change map of examples/, drawn over the meadow -> (128, 128) in [0, 1], 0 = change"""
    return map_over(open_picture(EXAMPLES / name), open_picture(EXAMPLES / "meadow.png"))


def draw_noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
