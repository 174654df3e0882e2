"""-m bench's topic of softmax splatting: the kernel of warp.py, beside what is usual on a CPU and on a GPU."""

import functools
from functools import partial

import torch
import torch.nn.functional as F

import warp
from bench.clock import alternate, compare
from kernels.compile import compile_cuda, load_cuda

CPU_SHAPES = ((1, 3, 512, 512), (1, 6, 1080, 1920))
GPU_SHAPES = (*CPU_SHAPES, (8, 6, 1080, 1920))

# ---------------------------------------------------------------------------------------------------------------------
# What is usual


def index_add_soft(x, flow, metric):
    """Softmax splatting as it is usually written on index_add_: four passes, and a metric small enough for exp."""
    B, C, H, W = x.shape
    w = metric.exp()
    x = torch.cat([x * w, w], 1).permute(0, 2, 3, 1).reshape(-1, C + 1)
    X = torch.arange(W, device=x.device) + flow[:, 0]
    Y = torch.arange(H, device=x.device)[:, None] + flow[:, 1]
    out = torch.zeros(B * H * W, C + 1, device=x.device)
    batch = torch.arange(B, device=x.device)[:, None, None] * H * W
    for dx in (0, 1):
        for dy in (0, 1):
            x0, y0 = X.floor() + dx, Y.floor() + dy
            inside = ((x0 >= 0) & (x0 < W) & (y0 >= 0) & (y0 < H)).flatten()
            b = ((1 - (X - x0).abs()) * (1 - (Y - y0).abs())).reshape(-1, 1)
            target = (batch + y0 * W + x0).flatten().long()
            out.index_add_(0, target[inside], (x * b)[inside])
    out = out.view(B, H, W, C + 1).permute(0, 3, 1, 2)
    return out[:, :C] / out[:, C:].clamp(min=1e-7)


# The way of the reference (github.com/sniklaus/softmax-splatting, a kernel for CuPy), written anew: a thread for every
# number of the input, each of which finds its pixel's four targets again, the sum of the weights as one channel more.
PER_ELEMENT = r"""
extern "C" __global__ void splat_each(const float* x, const float* flow, float* out, int C, int H, int W) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x, HW = H * W;
    if (column >= W) return;
    for (int row = blockIdx.y; row < H; row += gridDim.y) {
        const int n = blockIdx.z / C, i = row * W + column;
        const float* F = flow + (long long)2 * n * HW;
        const float X = column + F[i], Y = row + F[HW + i];
        if (!(fabsf(X) < 1e9f && fabsf(Y) < 1e9f)) continue;
        const int left = (int)floorf(X), top = (int)floorf(Y);
        const float value = x[(long long)blockIdx.z * HW + i];
        float* plane = out + (long long)blockIdx.z * HW;
        for (int k = 0; k < 4; k++) {
            const int px = left + (k & 1), py = top + (k >> 1);
            if (px >= 0 && px < W && py >= 0 && py < H)
                atomicAdd(&plane[py * W + px], value * (1 - fabsf(X - px)) * (1 - fabsf(Y - py)));
        }
    }
}
"""


@functools.cache
def per_element_kernel(device):
    code = compile_cuda("splat_each", PER_ELEMENT, torch.cuda.get_device_capability(device))
    return load_cuda(device.index or 0, code)


def per_element_soft(x, flow, metric, launch=None):
    """Softmax splatting by PER_ELEMENT. launch(name, (planes, H, W), *arguments); None: on the GPU where x is"""
    B, C, H, W = x.shape
    w = metric.exp()
    x, flow = torch.cat([x * w, w], 1).contiguous(), flow.contiguous()
    out = torch.zeros_like(x)
    launch = launch or per_element_kernel(x.device)
    launch("splat_each", (B * (C + 1), H, W), x, flow, out, C + 1, H, W)
    return out[:, :C] / out[:, C:].clamp(min=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# The rows


def sample(shape, device):
    """x, flow, metric: random, with a flow as smooth as of things that move."""
    B, C, H, W = shape
    g = torch.Generator().manual_seed(0)
    x, metric = torch.rand(B, C, H, W, generator=g), -torch.rand(B, 1, H, W, generator=g)
    flow = 20 * F.interpolate(torch.randn(B, 2, 8, 8, generator=g), (H, W), mode="bicubic")
    return [t.to(device) for t in (x, flow, metric)]


def bytes_copied_a_second(o):
    """What the memory gives: a tensor of 256 MiB copied, each byte read once and written once."""
    a = torch.zeros(2**26, device=o.device)
    b = torch.empty_like(a)
    s, _ = alternate({"copy": lambda: b.copy_(a)}, o)
    return 2 * a.nbytes / min(s["copy"])


def share_of_bandwidth(shape, time, available):
    """(B, C, H, W), the summary of seconds, bytes a second -> which share of them the necessary traffic takes: picture,
    flow and metric read once, the result written once."""
    B, C, H, W = shape
    share = 4 * B * H * W * (2 * C + 3) / available
    figures = {"median": share / time["median"], "low": share / time["high"], "high": share / time["low"]}
    return time | figures | {"unit": "%"}


def splatting(o):
    """Softmax splatting, forward, soft mode. Ours subtracts every target's largest metric in a pass of its own, which
    the peers do not: they overflow at 89. Of bandwidth: the least traffic that there can be, against what a large copy
    reaches; of what fits into a cache it may be more than all."""
    cuda = o.device.type == "cuda"
    available = functools.cache(lambda: bytes_copied_a_second(o))
    peers = {"index_add_": (index_add_soft, 0.5)}
    if cuda:
        peers["a thread per element"] = per_element_soft, None
    peers["our plain twin"] = lambda x, flow, metric: warp.softsplat_plain(x, flow, metric, "soft")[0], None

    def row(shape, name):
        x, (peer, limit) = sample(shape, o.device), peers[name]
        figures = compare(o, partial(warp.softsplat, *x), partial(peer, *x), name, limit)
        return figures | {"of bandwidth": share_of_bandwidth(shape, figures["ours"], available())}

    return {f"{W}x{H}x{C}{f', batch {B}' if B > 1 else ''}, {name}": partial(row, (B, C, H, W), name)
            for B, C, H, W in (GPU_SHAPES if cuda else CPU_SHAPES) for name in peers}


TOPICS = {"splat": ("Softmax splatting", splatting)}
