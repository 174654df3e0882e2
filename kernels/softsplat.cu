// Softmax splatting, one thread per source pixel q. Niklaus & Liu 2020, 2003.05534, section 3.1.
//
// warp.py compiles this file for GPUs, softsplat_cpu.cpp includes it for CPUs. softsplat_plain in
// warp.py is the plain version of what it computes.
//
//     x, out       (B, C, H, W)      flow       (B, 2, H, W), x before y
//     metric       (B, H, W), Z      peak       (B, H, W), the largest Z that lands on each target
//     norm         (B, H, W), the sum of the weights a = b w that land on each target
//
// Null pointers choose the mode:
//     no metric                         w = 1
//     metric                            w = Z
//     metric and peak                   w = exp(Z - peak)
//     no norm, in the backward pass     nothing was divided
//
// A launch reads the source rows first .. last and writes only targets in the rows lo .. hi, so
// that CPU threads can own a band each. On a GPU both are 0 .. H, and the loops run once.
#define PIXELS(first, last)                                                         \
    const long long n = blockIdx.z, HW = (long long)H * W;                          \
    const int right = (int)(gridDim.x * blockDim.x), down = (int)gridDim.y;         \
    for (int y = (first) + (int)blockIdx.y; y < (last); y += down)                  \
        for (int x = (int)(blockIdx.x * blockDim.x + threadIdx.x); x < W; x += right)

// Floats as unsigned integers in the same order, 0 below all: CUDA has no atomicMax for floats.
__device__ __forceinline__ unsigned ordered(float z) {
    unsigned bits = __float_as_uint(z);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(unsigned key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Where a pixel lands: the four targets p around q + F[q].
struct Landing {
    int p[4];                    // y W + x; -1 = outside
    float b[4];                  // bilinear weights b(p - q - F[q])
    float db_dx[4], db_dy[4];    // their slopes in the flow
    float Z;
};

// -> whether pixel (x, y) of picture n lands on any target at all
__device__ __forceinline__ bool land(const float* flow, const float* metric, long long n,
                                     long long HW, int x, int y, int H, int W, int lo, int hi,
                                     Landing& at) {
    const long long i = (long long)y * W + x;
    const float Y = y + flow[(2 * n + 1) * HW + i];
    if (!(Y > lo - 1 && Y < hi)) return false;  // also if it is NaN
    const float X = x + flow[2 * n * HW + i];
    if (!(X > -1 && X < W)) return false;
    at.Z = metric ? metric[n * HW + i] : 1.0f;
    if (!(at.Z - at.Z == 0.0f)) return false;  // infinite or NaN

    const int x0 = (int)X - (X < 0), y0 = (int)Y - (Y < 0);
    const float fx = X - x0, fy = Y - y0;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const int dx = k & 1, dy = k >> 1, px = x0 + dx, py = y0 + dy;
        const float bx = dx ? fx : 1 - fx, by = dy ? fy : 1 - fy;
        at.p[k] = px >= 0 && px < W && py >= lo && py < hi ? py * W + px : -1;
        at.b[k] = bx * by;
        at.db_dx[k] = dx ? by : -by;
        at.db_dy[k] = dy ? bx : -bx;
    }
    return true;
}

// A corner of no weight has no say in the peak, and may exceed it: its derivative stays finite.
__device__ __forceinline__ float weight(float Z, const unsigned* peak, long long p) {
    if (!peak) return Z;
    const float below = Z - (peak[p] ? unordered(peak[p]) : Z);
    return expf(below < 0 ? below : 0.0f);
}

// First pass, for softmax splatting alone: the peak of each target.
extern "C" __global__ void find_peak(const float* flow, const float* metric, unsigned* peak,
                                     int H, int W, int first, int last, int lo, int hi) {
    PIXELS(first, last) {
        Landing at;
        if (!land(flow, metric, n, HW, x, y, H, W, lo, hi, at)) continue;
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (at.p[k] >= 0 && at.b[k] > 0) atomicMax(&peak[n * HW + at.p[k]], ordered(at.Z));
    }
}

// Second pass: every pixel adds a x to each of its targets, and a to the target's norm.
extern "C" __global__ void splat(const float* image, const float* flow, const float* metric,
                                 const unsigned* peak, float* out, float* norm,
                                 int C, int H, int W, int first, int last, int lo, int hi) {
    PIXELS(first, last) {
        Landing at;
        if (!land(flow, metric, n, HW, x, y, H, W, lo, hi, at)) continue;
        float a[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const bool gives = at.p[k] >= 0 && at.b[k] > 0;
            a[k] = gives ? at.b[k] * weight(at.Z, peak, n * HW + at.p[k]) : 0;
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

// Third pass, one thread per target: the sum over its norm. Holes stay 0.
extern "C" __global__ void normalise(float* out, const float* norm,
                                     int C, int H, int W, int first, int last) {
    PIXELS(first, last) {
        const long long i = (long long)y * W + x;
        const float N = norm[n * HW + i];
        for (int c = 0; c < C; c++) {
            float* target = out + (n * C + c) * HW + i;
            *target = N != 0 ? *target / N : 0;
        }
    }
}

// Backward pass, one thread per source pixel: it gathers from its targets, and nothing is atomic.
// With I[p] = sum_q a x / N, N = sum_q a, a = b w:   dI/dx = a / N,   dI/da = (x - I) / N.
// The peak cancels.
extern "C" __global__ void splat_backward(const float* grad, const float* image,
                                          const float* flow, const float* metric,
                                          const unsigned* peak, const float* out, const float* norm,
                                          float* d_image, float* d_flow, float* d_metric,
                                          int C, int H, int W, int first, int last) {
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

        // By the colours, channel after channel.
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

        // By the flow, through b, and by the metric, through w.
        float dx = 0, dy = 0, dZ = 0;
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (at.p[k] >= 0) {
                dx += at.db_dx[k] * w[k] * dot[k] / N[k];
                dy += at.db_dy[k] * w[k] * dot[k] / N[k];
                dZ += at.b[k] * (peak ? w[k] : 1.0f) * dot[k] / N[k];  // exp is its own derivative
            }
        d_flow[2 * n * HW + i] = dx;
        d_flow[(2 * n + 1) * HW + i] = dy;
        if (d_metric) d_metric[n * HW + i] = dZ;
    }
}
