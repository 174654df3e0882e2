"""Moving pixels along optical flow: forward (splatting), backward (sampling), piece by piece.

    softsplat(x, flow, metric, mode)    forward: pixels are thrown to where the flow says
    backwarp(x, flow)                   backward: every pixel is fetched from where the flow says
    compose_flow(f01, f12)              0 -> 1 -> 2
    piecewise_affine_warp(image, ...)   a similarity for each segment, as in Magic Fixup

Splatting exists twice. `softsplat_plain` is obvious PyTorch; kernels/softsplat.cu is one thread per
source pixel in CUDA C, tested against it. It is compiled at first use: for a GPU by the NVRTC that
torch ships, for a CPU by g++ behind kernels/softsplat_cpu.cpp, which turns the grid into a loop.
Without a compiler there is one warning, and the plain version.

A flow is (B, 2, H, W) in pixels, x to the right before y down; pixel centres are whole numbers. A
vector that is not finite says "no correspondence", and NaN is what the functions here write for it.
"""

import functools
import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.compile import compile_cpu, compile_cuda, load_cuda

# --------------------------------------------------------------------------------------------------
# Forward: softmax splatting, Niklaus & Liu 2020, 2003.05534, section 3.1


def softsplat(x, flow, metric=None, mode="soft", *, holes=False):
    """Forward warp: each pixel q is thrown to q + F[q], and shared out to the four p around that.

        I[p] = sum_q b(u) w[q] x[q] / sum_q b(u) w[q]
        u = p - (q + F[q]),    b(u) = max(0, 1 - |u_x|) max(0, 1 - |u_y|)

    mode   'sum': w = 1, no division; 'avg': w = 1; 'linear': w = Z; 'soft': w = exp(Z)
    x      (B, C, H, W) real and finite;  flow (B, 2, H, W), F
    metric (B, 1, H, W), the importance Z: who wins where several land. Read by 'linear' and 'soft'
           only. Not finite: lands nowhere. Soft weights cannot overflow
      ->   (B, C, H, W) like x; 0 where nothing landed. With holes=True also (B, 1, H, W) bool

    Differentiable in x, flow and metric; where a flow is whole, by the derivative from the right.
    float64 runs in plain PyTorch, all else in float32. Repeatable bit for bit on a CPU, but not on
    a GPU, which adds in any order. ValueError: wrong shapes, an unknown mode, no metric.
    """
    B, _, H, W = x.shape
    if mode not in ("sum", "avg", "linear", "soft"):
        raise ValueError(f"unknown mode {mode!r}: choose sum, avg, linear or soft")
    if not x.is_floating_point():
        raise ValueError(f"x is floating point, not {x.dtype}")
    if mode in ("sum", "avg"):
        metric = None
    elif metric is None:
        raise ValueError(f"mode {mode!r} weighs pixels by a metric (B, 1, H, W), and there is none")
    for name, t, shape in (("flow", flow, (B, 2, H, W)), ("metric", metric, (B, 1, H, W))):
        if t is not None and (t.shape != shape or t.device != x.device):
            found, asked = f"{tuple(t.shape)} on {t.device}", f"{shape} on {x.device}"
            raise ValueError(f"{name} is {found}, but x asks for {asked}")

    # The kernel computes in float32; half precision is converted, float64 stays with PyTorch.
    dtype = torch.promote_types(x.dtype, torch.float32)
    args = [t if t is None else t.to(dtype) for t in (x, flow, metric)]
    fast = dtype == torch.float32 and x.numel() > 0 and load_kernels(x.device)
    splat = SoftsplatKernel.apply if fast else softsplat_plain
    out, norm = splat(*args, mode)
    out = out.to(x.dtype)
    return (out, norm == 0) if holes else out


def softsplat_plain(x, flow, metric, mode):
    """What splatting computes. -> I (B, C, H, W);  its denominator (B, 1, H, W), 0 in holes"""
    B, C, H, W = x.shape
    pixels = x.reshape(B, C, H * W)

    # Where each source pixel q lands: q + F[q]. One that lands outside the picture, or has no
    # correspondence (comparing NaN is False), is lost.
    X, Y = positions(flow)
    X, Y = X.reshape(B, 1, H * W), Y.reshape(B, 1, H * W)
    lands = (X > -1) & (X < W) & (Y > -1) & (Y < H)
    if metric is not None:
        Z = metric.reshape(B, 1, H * W)
        lands = lands & Z.isfinite()
        Z = Z.where(lands, 0)
    X, Y = X.where(lands, 0), Y.where(lands, 0)

    # The four pixels p around that, as numbers y W + x, and b(u): how much of q each of them gets.
    left, top = X.detach().floor(), Y.detach().floor()
    corners = []
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        p_x, p_y = left + dx, top + dy
        b_x = X - left if dx else 1 - (X - left)
        b_y = Y - top if dy else 1 - (Y - top)
        inside = lands & (p_x >= 0) & (p_x < W) & (p_y >= 0) & (p_y < H)
        p = (p_y * W + p_x).where(inside, 0).long()
        corners.append((p, (b_x * b_y).where(inside, 0)))

    # Softmax splatting subtracts from Z the largest Z that lands on p. The quotient is the same,
    # and exp cannot overflow.
    if mode == "soft":
        peak = Z.new_full(Z.shape, -torch.inf)
        for p, b in corners:
            peak.scatter_reduce_(2, p, Z.detach().where(b > 0, -torch.inf), "amax")

    # Numerator and denominator, summed over all q
    out, norm = torch.zeros_like(pixels), x.new_zeros(B, 1, H * W)
    for p, b in corners:
        if mode == "soft":
            a = b * (Z - peak.gather(2, p)).clamp(max=0).exp()
        elif mode == "linear":
            a = b * Z
        else:
            a = b
        out = out.scatter_add(2, p.expand(B, C, -1), a * pixels)
        norm = norm.scatter_add(2, p, a)
    if mode != "sum":
        out = torch.where(norm == 0, 0, out / norm.where(norm != 0, 1))
    return out.view(x.shape), norm.view(B, 1, H, W)


class SoftsplatKernel(torch.autograd.Function):
    """softsplat_plain by kernels/softsplat.cu, in float32. (No derivative of the denominator.)"""

    @staticmethod
    def forward(ctx, x, flow, metric, mode):
        B, C, H, W = x.shape
        run = load_kernels(x.device)
        x, flow, metric = (t if t is None else t.detach().contiguous() for t in (x, flow, metric))
        out, norm = torch.zeros_like(x), x.new_zeros(B, 1, H, W)
        peak = None
        if mode == "soft":
            peak = torch.zeros(B, H, W, dtype=torch.int32, device=x.device)
        if x.is_cuda:
            if mode == "soft":
                run("find_peak", (B, H, W), flow, metric, peak, H, W, 0, H, 0, H)
            run("splat", (B, H, W), x, flow, metric, peak, out, norm, C, H, W, 0, H, 0, H)
            if mode != "sum":
                run("normalise", (B, H, W), out, norm, C, H, W, 0, H)
        else:
            divide = int(mode != "sum")
            run("forward", x, flow, metric, peak, out, norm, B, C, H, W, divide, count_threads())
        ctx.save_for_backward(x, flow, metric, peak, out, norm if mode != "sum" else None)
        ctx.mark_non_differentiable(norm)
        return out, norm

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        x, flow, metric, peak, out, norm = ctx.saved_tensors
        B, C, H, W = x.shape
        run = load_kernels(x.device)
        d_x, d_flow = torch.empty_like(x), torch.empty_like(flow)
        d_metric = None if metric is None else torch.empty_like(metric)
        args = grad.contiguous(), x, flow, metric, peak, out, norm, d_x, d_flow, d_metric
        if x.is_cuda:
            run("splat_backward", (B, H, W), *args, C, H, W, 0, H)
        else:
            run("backward", *args, B, C, H, W, count_threads())
        return d_x, d_flow, d_metric, None


@functools.cache
def load_kernels(device):
    """The compiled kernels: a function of a name and its arguments. None where that cannot be."""
    folder = Path(__file__).parent / "kernels"
    try:
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            code = compile_cuda("softsplat", (folder / "softsplat.cu").read_text(), capability)
            return load_cuda(device.index, code)
        if device.type == "cpu":
            return compile_cpu(folder / "softsplat_cpu.cpp", folder / "softsplat.cu")
    except (OSError, RuntimeError) as error:
        slow = f"softsplat on {device} runs in plain PyTorch, several times slower"
        warnings.warn(f"{slow}: {error}", stacklevel=3)
    return None


def count_threads():
    return min(torch.get_num_threads(), 8)  # every thread reads the whole flow: more stop paying


# --------------------------------------------------------------------------------------------------
# Backward, and flows


def positions(flow):
    """flow (B, 2, H, W) -> where each pixel goes: X, Y, each (B, H, W)"""
    H, W = flow.shape[-2:]
    x, y = torch.arange(W, device=flow.device), torch.arange(H, device=flow.device)
    return x + flow[:, 0], y[:, None] + flow[:, 1]


def sample(x, X, Y, padding):
    """x (B, C, H, W) read at X, Y (B, h, w), bilinear; padding 'zeros', 'border' -> (B, C, h, w)"""
    H, W = x.shape[-2:]
    grid = torch.stack([(2 * X + 1) / W - 1, (2 * Y + 1) / H - 1], dim=-1)
    return F.grid_sample(x, grid.to(x.dtype), padding_mode=padding, align_corners=False)


def backwarp(x, flow, outside="zeros", *, mask=False):
    """Backward warp: x (B, C, H, W) read at q + flow[q], bilinear -> (B, C, H, W).

    A pixel is a unit square: positions in -0.5 .. W - 0.5 are inside; near the edge they read the
    edge. Those outside give 0, or with outside='border' the nearest edge. A flow that is not finite
    gives 0. With mask=True also (B, 1, H, W) bool: True = inside. Computed in float32 or better.
    Differentiable in x and flow. ValueError for another `outside`.
    """
    if outside not in ("zeros", "border"):
        raise ValueError(f"outside is 'zeros' or 'border', not {outside!r}")
    H, W = x.shape[-2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    X, Y = positions(flow.to(dtype))
    inside = ((X >= -0.5) & (X <= W - 0.5) & (Y >= -0.5) & (Y <= H - 0.5))[:, None]
    finite = X.isfinite() & Y.isfinite()
    y = sample(x.to(dtype), X.where(finite, 0), Y.where(finite, 0), "border")
    y = y.where(inside if outside == "zeros" else finite[:, None], 0).to(x.dtype)
    return (y, inside) if mask else y


def importance(image, target, flow):
    """Who wins where several pixels land: Z (B, 1, H, W) for `softsplat`.

    Z = -20 |I - backwarp(I_gt)|, of pictures (B, 3, H, W) in [0, 1]: the less a pixel looks like
    what it becomes, the less it counts. The paper does not say which Z; this is its release's,
    which also clips it to -20 .. 20, where it is already.
    """
    return -20 * (image - backwarp(target, flow)).abs().mean(1, keepdim=True)


def compose_flow(f01, f12, outside="unknown"):
    """Flow 0 -> 1 and flow 1 -> 2, both (B, 2, H, W) -> flow 0 -> 2.

    The next flow is read at the displaced position (Magic Fixup, section 3.5):
    f02[q] = f01[q] + f12[q + f01[q]]. A pixel that is out of frame in between gets NaN, and with
    outside='border' goes on as the nearest edge does.
    """
    if outside == "border":
        return f01 + backwarp(f12, f01, "border")
    f12, inside = backwarp(f12, f01, mask=True)
    return (f01 + f12).where(inside, torch.nan)


def forward_backward_consistency(f01, f10):
    """(B, 2, H, W) twice -> (B, 1, H, W) bool: True where there and back leads home, not occluded.

    The usual test, Sundaram et al. 2010, equation 5: |f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5, with
    b read where f leads.
    """

    def square(v):
        return v.square().sum(1, keepdim=True)

    residual = compose_flow(f01, f10)  # f + b; NaN, which compares False, out of frame
    b = residual - f01
    return square(residual) < 0.01 * (square(f01) + square(b)) + 0.5


def flow_to_colour(flow):
    """flow (B, 2, H, W) -> a picture (B, 3, H, W) in 0 .. 1; unknown is black.

    Hue is direction (right: red, down: lime, left: cyan). Saturation is length, as a share of the
    flow's longest.
    """
    known = flow.isfinite().all(1, keepdim=True)
    flow = flow.where(known, 0)
    length = flow.norm(dim=1, keepdim=True)  # (B, 1, H, W)
    longest = length.amax((2, 3), keepdim=True).clamp(min=1e-6)
    hue = torch.atan2(flow[:, 1:], flow[:, :1]) * (3 / torch.pi)  # -3 .. 3, six colours around
    offset = torch.tensor([0.0, 4.0, 2.0], device=flow.device).view(1, 3, 1, 1)
    colour = (((hue + offset) % 6 - 3).abs() - 1).clamp(0, 1)
    return (1 - (length / longest).clamp(max=1) * (1 - colour)) * known


# --------------------------------------------------------------------------------------------------
# Piece by piece: the second motion model of Magic Fixup, section 3.5

POINTS = 500  # of each segment, for RANSAC. (The release takes 50.)


def piecewise_affine_warp(image, flow, segments, depth, metric=None):
    """Every segment moves by the similarity that fits its flow best, the rest by the flow itself.

    image     (C, H, W) float;  flow (2, H, W) in pixels
    segments  (H, W) whole numbers, 0 = none. One that no similarity fits goes with the rest
    depth     (H, W), larger = farther. Segments are laid over the rest, from far to near on average
    metric    (H, W), the importance where pixels of the rest collide (None: they mix)
      ->      image (C, H, W), 0 in holes;  holes (H, W) bool;  source (H, W, 2): the x, y that each
              pixel came from, NaN in holes. All on the CPU. ValueError for shapes that do not fit
    """
    image, flow, segments, depth = (t.detach().cpu() for t in (image, flow, segments, depth))
    C, H, W = image.shape
    if flow.shape != (2, H, W) or segments.shape != (H, W) or depth.shape != (H, W):
        sizes = ", ".join(str(tuple(t.shape)) for t in (flow, segments, depth))
        raise ValueError(f"flow, segments, depth {sizes} do not fit an image of {H} x {W}")
    image, flow = image.float(), flow.float()
    here = torch.stack(torch.meshgrid(torch.arange(W), torch.arange(H), indexing="xy")).float()

    # One similarity for each segment, and how far away it is on average
    rng = np.random.default_rng(0)
    pieces = []
    rest = torch.ones(H, W, dtype=torch.bool)
    for label in segments.unique().tolist():
        inside = segments == label
        A = fit_similarity(here[:, inside], flow[:, inside], rng) if label else None
        if A is not None:
            pieces.append((depth[inside].double().mean().item(), inside, A))
            rest &= ~inside

    # The rest is splatted, coordinates (x, y) along with colours: they say where a pixel came from.
    Z, mode = None, "avg"
    if metric is not None:
        Z, mode = metric.detach().cpu().float()[None, None], "soft"
    layer, holes = softsplat(
        torch.cat([image, here])[None], flow.where(rest, torch.nan)[None], Z, mode, holes=True
    )
    out, source, holes = layer[0, :C], layer[0, C:], holes[0, 0]
    source[:, holes] = torch.nan

    # Segments are laid over it, the farthest first. A is for indices of pixels, lift for edges.
    opaque = torch.cat([image, torch.ones(1, H, W)]).permute(1, 2, 0).numpy()
    for _, inside, A in sorted(pieces, key=lambda piece: -piece[0]):
        edges = np.column_stack([A[:, :2], A[:, 2] + 0.5 - A[:, :2].sum(1) / 2])
        lifted = lift(opaque, inside.numpy(), edges)
        if lifted is None:
            continue
        piece, (x0, y0), (v, u) = lifted

        # Each pixel there is read from where it came from, X, Y. More than half covered, it counts.
        back = torch.from_numpy(cv2.invertAffineTransform(A)).double()
        there = here[:, v, u].double()  # (2, h, w)
        X, Y = torch.einsum("ij,jhw->ihw", back[:, :2], there) + back[:, 2, None, None]  # (h, w)
        piece = torch.from_numpy(piece).permute(2, 0, 1).contiguous()[None]  # (1, C + 1, ., .)
        piece = sample(piece, (X - x0).float()[None], (Y - y0).float()[None], "zeros")[0]
        # From here on it is (C + 1, h, w).
        cover = piece[C] > 0.5
        colours = piece[:C] / piece[C].clamp(min=0.5)
        out[:, v, u] = torch.where(cover, colours, out[:, v, u])
        source[:, v, u] = torch.where(cover, torch.stack([X, Y]).float(), source[:, v, u])
        holes[v, u] &= ~cover
    return out, holes, source.permute(1, 2, 0)


def fit_similarity(here, flow, rng):
    """Pixels (2, n), their flow (2, n) -> (2, 3) float64: rotation, scale, shift; or None.

    RANSAC at 3 pixels, of POINTS pixels drawn by rng.
    """
    known = flow.isfinite().all(0).nonzero()[:, 0].numpy()
    if len(known) < 2:
        return None
    if len(known) > POINTS:
        known = rng.choice(known, POINTS, replace=False)
    start, end = here[:, known].T.numpy(), (here + flow)[:, known].T.numpy()
    A, _ = cv2.estimateAffinePartial2D(start, end, method=cv2.RANSAC, ransacReprojThreshold=3.0)
    usable = A is not None and np.isfinite(A).all() and abs(np.linalg.det(A[:, :2])) > 1e-8
    return A if usable else None


def lift(image, mask, matrix):
    """Cut a piece out of a picture that is to be moved. None if it ends up outside.

    image   (H, W, C + 1): colours, and as the last channel full coverage
    mask    (H, W) bool
    matrix  (2, 3) takes points of the picture, which spans 0 .. W and 0 .. H, to where they go
      ->    (h, w, C + 1): colours times coverage, and coverage, so that nothing of its surroundings
            comes along when it is resampled;  its first pixel (x, y) in the picture;
            the slices of y and x where it will be seen, at most
    """
    H, W = mask.shape
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    if not len(rows):
        return None
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    corners = matrix @ np.array([[x0, x1, x0, x1], [y0, y0, y1, y1], [1, 1, 1, 1]])
    (u0, v0), (u1, v1) = np.floor(corners.min(1)) - 1, np.ceil(corners.max(1)) + 1
    u0, u1 = np.clip([u0, u1], 0, W).astype(int).tolist()
    v0, v1 = np.clip([v0, v1], 0, H).astype(int).tolist()
    if u0 >= u1 or v0 >= v1:
        return None
    piece = image[y0:y1, x0:x1] * mask[y0:y1, x0:x1, None]
    return piece, (x0, y0), (slice(v0, v1), slice(u0, u1))
