// y = exp(scale * x - max) / sum(exp(scale * x - max)) along rows, float32 to the type of a product's factor.
//
// For attention with heads too wide for a fused kernel, between its two products. A block a row, in registers: one read.
// Numbers: float32, rounded once; what is not a number makes its row that, by the sum; sums in the fixed order of the block.
// Limits: rows that registers hold in vectors of 16 bytes are read once (32768 numbers); others three times.
// Reference: at::softmax of float32, then the conversion.

#include "kernels/softmax_rows.h"

#include "kernels/launch.cuh"
#include "kernels/rows.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kThreads = 512;

// The largest of the block; `scratch` as of block_sum.
__device__ inline float block_largest(float x, float* scratch) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    for (int i = 0; i < kThreads / 32; ++i) x = fmaxf(x, scratch[i]);
    return x;
}

// kVectors a thread in registers, or 0: a loop over the row for each of maximum, sum and result.
template <class T, int N, int kVectors>
__global__ void __launch_bounds__(kThreads) softmax_rows_kernel(const float* x, T* y, int width, float scale) {
    __shared__ float scratch[2][32];
    wait_for_the_kernel_before();
    start_the_kernel_after();
    const float* row = x + static_cast<int64_t>(blockIdx.x) * width;
    const int count = width / N;
    scale *= 1.44269504088896341f;  // powers of two from here on
    Vector<float, N> numbers[kVectors > 0 ? kVectors : 1];
    // Calls f(vector, its index); what lies beyond the row is left out of everything.
    const auto visit = [&](auto&& f) {
        if constexpr (kVectors > 0) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const int index = threadIdx.x + v * kThreads;
                if (index < count) f(numbers[v], index);
            }
        } else {
#pragma unroll 4
            for (int index = threadIdx.x; index < count; index += kThreads) {
                Vector<float, N> loaded = load<float, N>(row, index);
                f(loaded, index);
            }
        }
    };
    if constexpr (kVectors > 0) visit([&](Vector<float, N>& vector, int index) { vector = load_once<float, N>(row, index); });
    float largest = -INFINITY;
    visit([&](Vector<float, N>& vector, int) {
#pragma unroll
        for (int i = 0; i < N; ++i) largest = fmaxf(largest, vector.values[i]);
    });
    const float shift = block_largest(largest, scratch[0]) * scale;
    float sum = 0.0f;
    visit([&](Vector<float, N>& vector, int) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            vector.values[i] = exp2f(vector.values[i] * scale - shift);
            sum += vector.values[i];
        }
    });
    const float inverse = 1.0f / block_sum(sum, scratch[1]);
    visit([&](Vector<float, N>& vector, int index) {
        float results[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float power = kVectors > 0 ? vector.values[i] : exp2f(vector.values[i] * scale - shift);
            results[i] = power * inverse;
        }
        store(y, static_cast<int64_t>(blockIdx.x) * count + index, results);
    });
}

}  // namespace

cudaError_t softmax_rows(Type type, const float* x, void* y, int64_t rows, int64_t width, float scale, cudaStream_t stream) {
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const auto run = [&](auto* kernel) {
            return launch(kernel, static_cast<unsigned>(rows), kThreads, 0, stream, /*overlapped=*/true, x, static_cast<T*>(y),
                          static_cast<int>(width), scale);
        };
        if (!tiles<float>(width, {x, y}, {})) return run(softmax_rows_kernel<T, 1, 0>);
        const int64_t vectors = (width / 4 + kThreads - 1) / kThreads;  // a thread
        if (vectors <= 2) return run(softmax_rows_kernel<T, 4, 2>);
        if (vectors <= 8) return run(softmax_rows_kernel<T, 4, 8>);
        return vectors <= 16 ? run(softmax_rows_kernel<T, 4, 16>) : run(softmax_rows_kernel<T, 4, 0>);
    });
}

}  // namespace diffusionz::kernels
