"""Softmax splatting: pixels thrown to where a flow says. Niklaus & Liu 2020, 2003.05534, section 3.1.

It exists twice. `softsplat_plain` is slow, obvious PyTorch. KERNEL is one thread per source pixel in CUDA C, compiled
at first use by the NVRTC that torch ships, or by g++ behind a few lines that turn the grid into a loop: that is the
fast path on the CPU. (How, kernels/compile.py knows.) Without a compiler there is one warning, and the plain version.

A flow is (B, 2, H, W) in pixels, x to the right before y down; pixel centres are whole numbers. A vector that is not
finite says "no correspondence": it lands nowhere.
"""

import functools
import warnings

import torch
from torch.autograd.function import once_differentiable

from kernels import compile as native

# ---------------------------------------------------------------------------------------------------------------------
# Splatting, the slow and obvious way


def softsplat(x, flow, metric=None, mode="soft", *, clip=None, holes=False):
    """Forward warp: every source pixel q is thrown to q + flow[q] and shared out to the four pixels p around that.

        I[p] = sum_q b(p - q - flow[q]) w[q] x[q] / sum_q b(p - q - flow[q]) w[q],    b(u) = (1 - |u_x|)+ (1 - |u_y|)+

    mode   'sum': w = 1, no division; 'avg': w = 1; 'linear': w = metric; 'soft': w = exp(metric)
    x      (B, C, H, W) real and finite;  flow (B, 2, H, W) in pixels
    metric (B, 1, H, W), the importance Z: who wins where several land. Read by 'linear' and 'soft' only. Soft weights
           cannot overflow, because each target's largest metric is subtracted first. Not finite: lands nowhere
    clip   limits a soft metric to -clip .. clip (Magic Fixup's release: 20), so that what lies beyond mixes evenly
      ->   (B, C, H, W) like x; 0 where nothing landed. With holes=True also (B, 1, H, W) bool, True there

    Differentiable in x, flow and metric; at a whole-pixel flow the derivative is the one from the right.
    float64 runs in plain PyTorch, everything else in float32. Repeatable bit for bit on a CPU, not on a GPU (the order
    of atomic additions). ValueError for shapes that do not fit, an unknown mode, or a mode without its metric.
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
            raise ValueError(f"{name} is {tuple(t.shape)} on {t.device}, but x asks for {shape} on {x.device}")
    if clip is not None and mode == "soft":
        metric = metric.clamp(-clip, clip)

    dtype = torch.promote_types(x.dtype, torch.float32)
    args = [t if t is None else t.to(dtype) for t in (x, flow, metric)]
    if dtype == torch.float32 and x.numel() and kernels(x.device):
        out, norm = Splat.apply(*args, mode)
    else:
        out, norm = softsplat_plain(*args, mode)
    return (out.to(x.dtype), norm == 0) if holes else out.to(x.dtype)


def corners(flow):
    """The four pixels around where each pixel lands, one after the other, as (p, b, inside), each (B, 1, H W).

    p is the target's index y W + x, b the bilinear weight, differentiable in the flow; both 0 where it is not inside.
    """
    B, _, H, W = flow.shape
    y, x = torch.meshgrid(torch.arange(H, device=flow.device), torch.arange(W, device=flow.device), indexing="ij")
    X, Y = x + flow[:, 0], y + flow[:, 1]  # q + F[q]
    near = (X > -1) & (X < W) & (Y > -1) & (Y < H)  # and finite: comparing NaN is False
    X, Y = X.where(near, 0), Y.where(near, 0)
    x0, y0 = X.detach().floor(), Y.detach().floor()
    for dy in (0, 1):
        for dx in (0, 1):
            p_x, p_y = x0 + dx, y0 + dy
            inside = near & (p_x >= 0) & (p_x < W) & (p_y >= 0) & (p_y < H)
            b = (X - x0 if dx else 1 - (X - x0)) * (Y - y0 if dy else 1 - (Y - y0))
            p = (p_y * W + p_x).where(inside, 0).long()
            yield p.view(B, 1, H * W), b.where(inside, 0).view(B, 1, H * W), inside.view(B, 1, H * W)


def softsplat_plain(x, flow, metric, mode):
    """softsplat's arguments, checked -> the result and its normaliser (B, 1, H, W), 0 where nothing landed."""
    B, C, H, W = x.shape
    targets, usable = list(corners(flow)), torch.ones(B, 1, H * W, dtype=torch.bool, device=x.device)
    if metric is not None:
        Z = metric.reshape(B, 1, H * W)
        usable = Z.isfinite()
        Z = Z.where(usable, 0)
    if mode == "soft":  # first pass: the largest Z among those that land with some weight
        peak = Z.new_full(Z.shape, -torch.inf)
        for p, b, _ in targets:
            peak.scatter_reduce_(2, p, Z.detach().where(usable & (b > 0), -torch.inf), "amax")
    out, norm = x.new_zeros(B, C, H * W), x.new_zeros(B, 1, H * W)
    for p, b, inside in targets:
        if mode == "soft":
            w = (Z - peak.gather(2, p)).clamp(max=0).exp()
        else:
            w = Z if mode == "linear" else 1
        a = (b * w).where(inside & usable, 0)
        out = out.scatter_add(2, p.expand(B, C, -1), a * x.reshape(B, C, H * W))
        norm = norm.scatter_add(2, p, a)
    if mode != "sum":
        out = torch.where(norm == 0, 0, out / norm.where(norm != 0, 1))
    return out.view(x.shape), norm.view(B, 1, H, W)


# ---------------------------------------------------------------------------------------------------------------------
# The same as a kernel

KERNEL = r"""
// Null pointers choose the mode: no metric: w = 1; metric: w = Z; metric and peak: w = exp(Z - peak); no norm in the
// backward pass: nothing was divided. A launch reads the source rows first .. last and writes only targets in the rows
// lo .. hi, so that CPU threads can own a band each. On a GPU both are 0 .. H, and the loops run once.
#define PIXELS(first, last)                                                                          \
    const long long n = blockIdx.z, HW = (long long)H * W;                                           \
    for (int y = (first) + (int)blockIdx.y; y < (last); y += (int)gridDim.y)                         \
        for (int x = (int)(blockIdx.x * blockDim.x + threadIdx.x); x < W; x += (int)(gridDim.x * blockDim.x))

// Floats as unsigned integers in the same order, 0 below all of them: CUDA has no atomicMax for floats.
__device__ __forceinline__ unsigned ordered(float z) {
    unsigned bits = __float_as_uint(z);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Landing {
    int p[4];                           // targets y W + x; -1 = outside
    float b[4], db_dx[4], db_dy[4], Z;  // bilinear weights and their slopes; the metric
};

__device__ __forceinline__ bool land(const float* flow, const float* metric, long long n, long long HW, int x, int y,
                                     int H, int W, int lo, int hi, Landing& at) {
    const long long i = (long long)y * W + x;
    const float Y = y + flow[(2 * n + 1) * HW + i];
    if (!(Y > lo - 1 && Y < hi)) return false;  // also if it is NaN
    const float X = x + flow[2 * n * HW + i];
    if (!(X > -1 && X < W)) return false;
    at.Z = metric ? metric[n * HW + i] : 1.0f;
    if (!(at.Z - at.Z == 0.0f)) return false;   // infinite or NaN
    const int x0 = (int)X - (X < 0), y0 = (int)Y - (Y < 0);
    const float fx = X - x0, fy = Y - y0;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const int dx = k & 1, dy = k >> 1, px = x0 + dx, py = y0 + dy;
        const float bx = dx ? fx : 1 - fx, by = dy ? fy : 1 - fy;
        at.p[k] = px >= 0 && px < W && py >= lo && py < hi ? py * W + px : -1;
        at.b[k] = bx * by, at.db_dx[k] = dx ? by : -by, at.db_dy[k] = dy ? bx : -bx;
    }
    return true;
}

// A corner of no weight has no say in the peak, and may exceed it: its derivative stays finite.
__device__ __forceinline__ float weight(float Z, const unsigned* peak, long long p) {
    if (!peak) return Z;
    const float below = Z - (peak[p] ? unordered(peak[p]) : Z);
    return expf(below < 0 ? below : 0.0f);
}

extern "C" __global__ void find_peak(const float* flow, const float* metric, unsigned* peak, int H, int W, int first,
                                     int last, int lo, int hi) {
    PIXELS(first, last) {
        Landing at;
        if (!land(flow, metric, n, HW, x, y, H, W, lo, hi, at)) continue;
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (at.p[k] >= 0 && at.b[k] > 0) atomicMax(&peak[n * HW + at.p[k]], ordered(at.Z));
    }
}

extern "C" __global__ void splat(const float* image, const float* flow, const float* metric, const unsigned* peak,
                                 float* out, float* norm, int C, int H, int W, int first, int last, int lo, int hi) {
    PIXELS(first, last) {
        Landing at;
        if (!land(flow, metric, n, HW, x, y, H, W, lo, hi, at)) continue;
        float a[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            a[k] = at.p[k] >= 0 && at.b[k] > 0 ? at.b[k] * weight(at.Z, peak, n * HW + at.p[k]) : 0;
            if (a[k] != 0) atomicAdd(&norm[n * HW + at.p[k]], a[k]);
        }
        for (int c = 0; c < C; c++) {
            const float v = image[(n * C + c) * HW + (long long)y * W + x];
            float* plane = out + (n * C + c) * HW;
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (a[k] != 0) atomicAdd(&plane[at.p[k]], a[k] * v);
        }
    }
}

extern "C" __global__ void normalise(float* out, const float* norm, int C, int H, int W, int first, int last) {
    PIXELS(first, last) {
        const long long i = (long long)y * W + x;
        const float N = norm[n * HW + i];
        for (int c = 0; c < C; c++) out[(n * C + c) * HW + i] = N != 0 ? out[(n * C + c) * HW + i] / N : 0;
    }
}

// With I[p] = sum_q a x / N, N = sum_q a, a = b w:   dI/dx = a / N,   dI/da = (x - I) / N.  The peak cancels.
extern "C" __global__ void splat_backward(const float* grad, const float* image, const float* flow, const float* metric,
                                          const unsigned* peak, const float* out, const float* norm, float* d_image,
                                          float* d_flow, float* d_metric, int C, int H, int W, int first, int last) {
    PIXELS(first, last) {
        const long long i = (long long)y * W + x;
        Landing at;
        const bool lands = land(flow, metric, n, HW, x, y, H, W, 0, H, at);
        float w[4], N[4], dot[4] = {0, 0, 0, 0};  // dot: grad . (x - I)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (!lands) at.p[k] = -1;
            N[k] = norm && at.p[k] >= 0 ? norm[n * HW + at.p[k]] : 1.0f;
            if (N[k] == 0) at.p[k] = -1;
            w[k] = at.p[k] >= 0 ? weight(at.Z, peak, n * HW + at.p[k]) : 0;
        }
        for (int c = 0; c < C; c++) {
            const long long plane = (n * C + c) * HW;
            const float v = image[plane + i];
            float sum = 0;
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (at.p[k] >= 0) {
                    const float g = grad[plane + at.p[k]];
                    sum += at.b[k] * w[k] / N[k] * g;
                    dot[k] += (norm ? v - out[plane + at.p[k]] : v) * g;
                }
            d_image[plane + i] = sum;
        }
        float dx = 0, dy = 0, dZ = 0;
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (at.p[k] >= 0) {
                dx += at.db_dx[k] * w[k] * dot[k] / N[k];
                dy += at.db_dy[k] * w[k] * dot[k] / N[k];
                dZ += at.b[k] * (peak ? w[k] : 1.0f) * dot[k] / N[k];  // exp is its own derivative
            }
        d_flow[2 * n * HW + i] = dx, d_flow[(2 * n + 1) * HW + i] = dy;
        if (d_metric) d_metric[n * HW + i] = dZ;
    }
}
"""

# What makes the kernel a C++ program: a grid of one thread, so that its loops run over everything. Each CPU thread owns
# a band of target rows and meets its sources in reading order: no races, the same sums for any number of threads.
SHIM = r"""
#include <math.h>
#include <string.h>
#include <thread>
#include <vector>
#define __global__ static
#define __device__ static
#define __forceinline__ inline __attribute__((always_inline))
struct Index { unsigned x, y, z; };
static const Index threadIdx = {0, 0, 0}, blockDim = {1, 1, 1}, gridDim = {1, 1, 1};
static thread_local Index blockIdx = {0, 0, 0};
static inline void atomicAdd(float* to, float value) { *to += value; }
static inline void atomicMax(unsigned* to, unsigned value) { *to = *to < value ? value : *to; }
static inline unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
static inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
""" + KERNEL.replace('extern "C" __global__', "__global__") + r"""
template <class Function> static void bands(int B, int H, int threads, Function function) {
    const int each = B && threads > B ? (threads + B - 1) / B : 1;  // bands in each picture
    auto work = [&](int thread) {
        for (int band = thread; band < B * each; band += threads) {
            blockIdx.z = band / each;
            const long long k = band % each;
            function((int)(H * k / each), (int)(H * (k + 1) / each));
        }
    };
    std::vector<std::thread> others;
    for (int thread = 1; thread < threads; thread++) others.emplace_back(work, thread);
    work(0);
    for (auto& other : others) other.join();
}
extern "C" void forward(const float* image, const float* flow, const float* metric, unsigned* peak, float* out,
                        float* norm, int B, int C, int H, int W, int divide, int threads) {
    bands(B, H, threads, [&](int lo, int hi) {
        if (peak) find_peak(flow, metric, peak, H, W, 0, H, lo, hi);
        splat(image, flow, metric, peak, out, norm, C, H, W, 0, H, lo, hi);
        if (divide) normalise(out, norm, C, H, W, lo, hi);
    });
}
extern "C" void backward(const float* grad, const float* image, const float* flow, const float* metric,
                         const unsigned* peak, const float* out, const float* norm, float* d_image, float* d_flow,
                         float* d_metric, int B, int C, int H, int W, int threads) {
    bands(B, H, threads, [&](int lo, int hi) {
        splat_backward(grad, image, flow, metric, peak, out, norm, d_image, d_flow, d_metric, C, H, W, lo, hi);
    });
}
"""


class Splat(torch.autograd.Function):
    """softsplat_plain by the kernel: x, flow, metric float32, mode -> result, normaliser (not differentiable)."""

    @staticmethod
    def forward(ctx, x, flow, metric, mode):
        (B, C, H, W), run = x.shape, kernels(x.device)
        x, flow, metric = (t if t is None else t.detach().contiguous() for t in (x, flow, metric))
        out, norm = torch.zeros_like(x), x.new_zeros(B, 1, H, W)
        peak = torch.zeros(B, H, W, dtype=torch.int32, device=x.device) if mode == "soft" else None
        if x.is_cuda:
            if mode == "soft":
                run("find_peak", (B, H, W), flow, metric, peak, H, W, 0, H, 0, H)
            run("splat", (B, H, W), x, flow, metric, peak, out, norm, C, H, W, 0, H, 0, H)
            if mode != "sum":
                run("normalise", (B, H, W), out, norm, C, H, W, 0, H)
        else:
            run("forward", x, flow, metric, peak, out, norm, B, C, H, W, int(mode != "sum"), cpu_threads())
        ctx.save_for_backward(x, flow, metric, peak, out, norm if mode != "sum" else None)
        ctx.mark_non_differentiable(norm)
        return out, norm

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        x, flow, metric, peak, out, norm = ctx.saved_tensors
        (B, C, H, W), run = x.shape, kernels(x.device)
        d_x, d_flow = torch.empty_like(x), torch.empty_like(flow)
        d_metric = None if metric is None else torch.empty_like(metric)
        args = grad.contiguous(), x, flow, metric, peak, out, norm, d_x, d_flow, d_metric
        if x.is_cuda:
            run("splat_backward", (B, H, W), *args, C, H, W, 0, H)
        else:
            run("backward", *args, B, C, H, W, cpu_threads())
        return d_x, d_flow, d_metric, None


@functools.cache
def kernels(device):
    """The compiled kernels, a function of a name and its arguments. None, with one warning, where that cannot be."""
    try:
        if device.type == "cuda":
            code = native.compile_cuda("softsplat", KERNEL, torch.cuda.get_device_capability(device))
            return native.load_cuda(device.index, code)
        return native.compile_cpu("softsplat", SHIM) if device.type == "cpu" else None
    except (OSError, RuntimeError) as error:
        warnings.warn(f"softsplat on {device} runs in plain PyTorch, several times slower: {error}", stacklevel=3)


def cpu_threads():
    return min(torch.get_num_threads(), 8)  # every thread reads the whole flow, so that more stop paying
