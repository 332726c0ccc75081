// y = exp(scale * x - max) / sum(exp(scale * x - max)) along rows, float32 to the type of a product's factor.
//
// For attention with heads too wide for a fused kernel: rows are made by a product with float32 results, a few hundred at once, so
// they are still in the second-level cache here, where a row is read twice.
// Numbers: float32, rounded once. A thread's sum follows its running maximum (Milakov and Gimelshein 2018).
// Limits: none. Reference: at::softmax of float32, then the conversion.

#include "kernels/softmax_rows.h"

#include "kernels/rows.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kThreads = 512;

template <class T, int N>
__global__ void __launch_bounds__(kThreads) softmax_rows_kernel(const float* x, T* y, int width, float scale) {
    __shared__ float scratch[2][32];
    const float* row = x + static_cast<int64_t>(blockIdx.x) * width;
    const int vectors = width / N;
    scale *= 1.44269504088896341f;  // powers of two from here on
    const float lowest = -INFINITY;
    float largest = lowest, sum = 0.0f;
#pragma unroll 4
    for (int v = threadIdx.x; v < vectors; v += kThreads) {
        const auto numbers = load<float, N>(row, v);
        float now = largest;
#pragma unroll
        for (int i = 0; i < N; ++i) now = fmaxf(now, numbers.values[i] * scale);
        const float shift = now == lowest ? 0.0f : now;
        sum *= exp2f(largest - shift);
#pragma unroll
        for (int i = 0; i < N; ++i) sum += exp2f(numbers.values[i] * scale - shift);
        largest = now;
    }
    // The largest of the block; maxima may be negative, unlike block_max's.
    float top = largest;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, step));
    if (threadIdx.x % 32 == 0) scratch[0][threadIdx.x / 32] = top;
    __syncthreads();
    for (int i = 0; i < kThreads / 32; ++i) top = fmaxf(top, scratch[0][i]);
    const float total = block_sum(largest == lowest ? 0.0f : sum * exp2f(largest - top), scratch[1]);
    const float inverse = 1.0f / total;
#pragma unroll 4
    for (int v = threadIdx.x; v < vectors; v += kThreads) {
        const auto numbers = load<float, N>(row, v);
        float results[N];
#pragma unroll
        for (int i = 0; i < N; ++i) results[i] = exp2f(numbers.values[i] * scale - top) * inverse;
        store(y, static_cast<int64_t>(blockIdx.x) * vectors + v, results);
    }
}

}  // namespace

cudaError_t softmax_rows(Type type, const float* x, void* y, int64_t rows, int64_t width, float scale, cudaStream_t stream) {
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const auto grid = static_cast<unsigned>(rows);
        if (tiles<float>(width, {x, y}, {}))
            softmax_rows_kernel<T, 4><<<grid, kThreads, 0, stream>>>(x, static_cast<T*>(y), static_cast<int>(width), scale);
        else
            softmax_rows_kernel<T, 1><<<grid, kThreads, 0, stream>>>(x, static_cast<T*>(y), static_cast<int>(width), scale);
        return cudaGetLastError();
    });
}

}  // namespace diffusionz::kernels
