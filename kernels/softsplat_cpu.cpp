// softsplat.cu as a C++ program: a grid of one thread, so that its loops run over everything.
//
// Each CPU thread owns a band of target rows and meets its sources in reading order: no races, and
// the same sums for any number of threads.

#include <math.h>
#include <string.h>
#include <thread>
#include <vector>

// What CUDA adds to C++, as far as softsplat.cu uses it
#define __global__ __attribute__((visibility("hidden")))
#define __device__ static
#define __forceinline__ inline __attribute__((always_inline))
struct Index { unsigned x, y, z; };
static const Index threadIdx = {0, 0, 0}, blockDim = {1, 1, 1}, gridDim = {1, 1, 1};
static thread_local Index blockIdx = {0, 0, 0};
static inline void atomicAdd(float* to, float value) { *to += value; }
static inline void atomicMax(unsigned* to, unsigned value) { *to = *to < value ? value : *to; }
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

#include "softsplat.cu"

// function(lo, hi) for bands of rows of every picture, on so many threads. blockIdx.z: the picture.
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

extern "C" void forward(const float* image, const float* flow, const float* metric, unsigned* peak,
                        float* out, float* norm, int B, int C, int H, int W, int divide,
                        int threads) {
    bands(B, H, threads, [&](int lo, int hi) {
        if (peak) find_peak(flow, metric, peak, H, W, 0, H, lo, hi);
        splat(image, flow, metric, peak, out, norm, C, H, W, 0, H, lo, hi);
        if (divide) normalise(out, norm, C, H, W, lo, hi);
    });
}

extern "C" void backward(const float* grad, const float* image, const float* flow,
                         const float* metric, const unsigned* peak, const float* out,
                         const float* norm, float* d_image, float* d_flow, float* d_metric,
                         int B, int C, int H, int W, int threads) {
    bands(B, H, threads, [&](int lo, int hi) {
        splat_backward(grad, image, flow, metric, peak, out, norm, d_image, d_flow, d_metric,
                       C, H, W, lo, hi);
    });
}
