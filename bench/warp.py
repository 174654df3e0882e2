"""python -m bench's topic of softmax splatting: our kernel beside the usual way, and beside its plain twin."""

from functools import partial

import torch
import torch.nn.functional as F

import warp
from bench.clock import compare

SHAPES = (1, 3, 512, 512), (1, 6, 1080, 1920)  # B, C, H, W


def index_add_soft(x, flow, metric):
    """Softmax splatting as it is usually written on index_add_: four passes, and a metric small enough for exp."""
    B, C, H, W = x.shape
    w = metric.exp()
    x = torch.cat([x * w, w], 1).permute(0, 2, 3, 1).reshape(-1, C + 1)
    X = torch.arange(W, device=x.device) + flow[:, 0]
    Y = torch.arange(H, device=x.device)[:, None] + flow[:, 1]
    out = torch.zeros(B * H * W, C + 1, device=x.device)
    batch = torch.arange(B, device=x.device)[:, None, None] * H * W

    # Each of the four neighbours of where a pixel lands gets its share.
    for dx in (0, 1):
        for dy in (0, 1):
            x0, y0 = X.floor() + dx, Y.floor() + dy
            inside = ((x0 >= 0) & (x0 < W) & (y0 >= 0) & (y0 < H)).flatten()
            share = ((1 - (X - x0).abs()) * (1 - (Y - y0).abs())).reshape(-1, 1)
            target = (batch + y0 * W + x0).flatten().long()
            out.index_add_(0, target[inside], (x * share)[inside])
    out = out.view(B, H, W, C + 1).permute(0, 3, 1, 2)
    return out[:, :C] / out[:, C:].clamp(min=1e-7)


def plain_soft(x, flow, metric):
    return warp.softsplat_plain(x, flow, metric, "soft")[0]


def make_inputs(shape, device):
    """x, flow, metric: random, with a flow as smooth as of things that move."""
    B, C, H, W = shape
    g = torch.Generator().manual_seed(0)
    x = torch.rand(B, C, H, W, generator=g)
    metric = -torch.rand(B, 1, H, W, generator=g)
    flow = 20 * F.interpolate(torch.randn(B, 2, 8, 8, generator=g), (H, W), mode="bicubic")
    return x.to(device), flow.to(device), metric.to(device)


def splatting(o):
    """Softmax splatting, forward.

    Ours subtracts every target's largest metric in a pass of its own, which index_add_ does not: that overflows at a
    metric of 89.
    """
    for shape in SHAPES:
        B, C, H, W = shape
        inputs = make_inputs(shape, o.device)
        for name, peer in (("index_add_", index_add_soft), ("our plain twin", plain_soft)):
            yield compare(o, f"{W}x{H}x{C}", partial(warp.softsplat, *inputs), partial(peer, *inputs), name)


TOPICS = {"splat": splatting}
