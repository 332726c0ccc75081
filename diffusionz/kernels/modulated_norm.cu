// The normalisations around the sublayers of a transformer block, each one pass over memory:
//
//   modulated_norm        y = x / sqrt(mean(x^2) + eps) * weight * scale
//
//   gated_residual        s = x + gate * (y / sqrt(mean(y^2) + eps) * weight)
//                         n = s / sqrt(mean(s^2) + eps) * next_weight * next_scale
//
//   modulated_layer_norm  y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * scale
//
// A block a row; the row stays in registers between its statistics and its result. What a row is multiplied by is read by every
// row and stays in the first-level cache, because the rows themselves are loaded past it. Results are also written as FP8 with
// the row's scale: the largest number comes out of the same registers.
//
// Numbers: float32 throughout, rounded once at the end (n follows from the unrounded s); sums in the fixed order of the block.
// Limits: rows up to a block's registers, 8192 numbers (16384 of 16 bits where vectors of 16 bytes tile them).
// Reference: ops/modulated_norm.cc.

#include "kernels/modulated_norm.h"
#include "kernels/rows.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

template <class T>
__device__ const T* row_of(const Rows& rows) {
    return static_cast<const T*>(rows.data) + blockIdx.y * rows.outer_stride + blockIdx.x * rows.inner_stride;
}

template <class T>
__device__ const T* row_of(const Factors& factors) {
    return factors.data ? static_cast<const T*>(factors.data) + blockIdx.y * factors.stride : nullptr;
}

__device__ inline int64_t row_index() { return static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x; }

// Multiplies by vector number `index` of `factors`; null stands for ones.
template <class T, int N>
__device__ inline void multiply(float (&x)[N], const T* factors, int index) {
    if (!factors) return;
    const auto vector = load<T, N>(factors, index);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= to_float(vector.values[i]);
}

// This thread's vectors of a row.
template <class T, int N, int V>
struct Row {
    Vector<T, N> vectors[V];

    __device__ explicit Row(const T* data, int count) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const int index = threadIdx.x + v * blockDim.x;
            vectors[v] = index < count ? load_once<T, N>(data, index) : Vector<T, N>{};
        }
    }

    __device__ float square_sum() const {
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
            for (int i = 0; i < N; ++i) sum += to_float(vectors[v].values[i]) * to_float(vectors[v].values[i]);
        }
        return sum;
    }
};

template <int N>
__device__ inline float largest_of(const float (&x)[N], float largest) {
#pragma unroll
    for (int i = 0; i < N; ++i) largest = fmaxf(largest, fabsf(x[i]));
    return largest;
}

// Writes numbers[v] * factor in the forms that `y` asks for; `largest` is the row's largest |numbers|.
template <class T, int N, int V>
__device__ void write(float (&numbers)[V][N], float factor, float largest, const Written& y, int count) {
    const int64_t row = row_index();
    const float scale = fp8_scale(largest * factor), fp8_factor = factor / scale;
    if (y.fp8 && threadIdx.x == 0) y.row_scales[row] = scale;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int index = threadIdx.x + v * blockDim.x;
        if (index >= count) break;
        if (y.fp8) store_fp8(y.fp8, row * count + index, numbers[v], fp8_factor);
        if (!y.plain) continue;
#pragma unroll
        for (int i = 0; i < N; ++i) numbers[v][i] *= factor;
        store(static_cast<T*>(y.plain), row * count + index, numbers[v]);
    }
}

template <class T, int N, int V>
__global__ void __launch_bounds__(kRowThreadsMax<V>)
    modulated_norm_kernel(Rows xs, const T* weight, Factors scales, Written y, int width, float eps) {
    __shared__ float scratch[64];
    between_kernels();
    const int count = width / N;
    const Row<T, N, V> x(row_of<T>(xs), count);
    const T* scale = row_of<T>(scales);
    float numbers[V][N], square_sum = x.square_sum(), largest = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int index = threadIdx.x + v * blockDim.x;
        if (index >= count) break;
#pragma unroll
        for (int i = 0; i < N; ++i) numbers[v][i] = to_float(x.vectors[v].values[i]);
        multiply(numbers[v], weight, index);
        multiply(numbers[v], scale, index);
        largest = largest_of(numbers[v], largest);
    }
    block_combine(square_sum, Sum(), largest, Most(), scratch);
    write<T>(numbers, rsqrtf(square_sum / static_cast<float>(width) + eps), largest, y, count);
}

template <class T, int N, int V>
__global__ void __launch_bounds__(kRowThreadsMax<V>)
    gated_residual_kernel(Rows xs, Rows ys, const T* weight, Factors gates, T* sums, const T* next_weight, Factors next_scales,
                          Written normed, int width, float eps) {
    __shared__ float scratch[3][32];
    between_kernels();
    const int count = width / N;
    const Row<T, N, V> y(row_of<T>(ys), count), x(row_of<T>(xs), count);
    const T *gate = row_of<T>(gates), *next_scale = row_of<T>(next_scales);
    float inverse = 1.0f;
    if (weight) inverse = rsqrtf(block_sum(y.square_sum(), scratch[0]) / static_cast<float>(width) + eps);

    float numbers[V][N], square_sum = 0.0f, largest = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int index = threadIdx.x + v * blockDim.x;
        if (index >= count) break;
#pragma unroll
        for (int i = 0; i < N; ++i) numbers[v][i] = to_float(y.vectors[v].values[i]) * inverse;
        multiply(numbers[v], weight, index);
        multiply(numbers[v], gate, index);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            numbers[v][i] += to_float(x.vectors[v].values[i]);
            square_sum += numbers[v][i] * numbers[v][i];
        }
        store(sums, row_index() * count + index, numbers[v]);
        if (!next_weight) continue;
        multiply(numbers[v], next_weight, index);
        multiply(numbers[v], next_scale, index);
        largest = largest_of(numbers[v], largest);
    }
    if (!next_weight) return;
    block_combine(square_sum, Sum(), largest, Most(), scratch[1]);
    write<T>(numbers, rsqrtf(square_sum / static_cast<float>(width) + eps), largest, normed, count);
}

template <class T, int N, int V>
__global__ void __launch_bounds__(kRowThreadsMax<V>)
    modulated_layer_norm_kernel(Rows xs, Factors scales, T* y, int width, float eps) {
    __shared__ float scratch[3][32];
    between_kernels();
    const int count = width / N;
    const Row<T, N, V> x(row_of<T>(xs), count);
    const T* scale = row_of<T>(scales);
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int i = 0; i < N; ++i) sum += to_float(x.vectors[v].values[i]);
    }
    const float mean = block_sum(sum, scratch[0]) / static_cast<float>(width);

    // Distances from the mean before their squares: E[x^2] - E[x]^2 loses its digits where the mean is large. There the mean's
    // own rounding shows, too; the mean of the distances is that error.
    float numbers[V][N], square_sum = 0.0f, error = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        if (threadIdx.x + v * blockDim.x >= count) break;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            numbers[v][i] = to_float(x.vectors[v].values[i]) - mean;
            error += numbers[v][i];
            square_sum += numbers[v][i] * numbers[v][i];
        }
    }
    block_combine(error, Sum(), square_sum, Sum(), scratch[1]);
    error /= static_cast<float>(width);
    const float inverse = rsqrtf(fmaxf(square_sum / static_cast<float>(width) - error * error, 0.0f) + eps);
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int index = threadIdx.x + v * blockDim.x;
        if (index >= count) break;
#pragma unroll
        for (int i = 0; i < N; ++i) numbers[v][i] = (numbers[v][i] - error) * inverse;
        multiply(numbers[v], scale, index);
        store(y, row_index() * count + index, numbers[v]);
    }
}

constexpr int64_t kOuterMax = 65535;  // blocks along y

}  // namespace

cudaError_t modulated_norm(Type type, Rows x, const void* weight, Factors scale, Written y, int64_t outer, int64_t inner,
                           int64_t width, float eps, cudaStream_t stream) {
    if (outer > kOuterMax) return cudaErrorNotSupported;
    const dim3 blocks(static_cast<unsigned>(inner), static_cast<unsigned>(outer));
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const bool aligned = tiles<T>(width, {x.data, weight, scale.data, y.plain, y.fp8},
                                      {outer > 1 ? x.outer_stride : 0, x.inner_stride, scale.stride});
        return launch_rows<T>(aligned, outer * inner, width, [&](auto numbers, auto vectors, int threads) {
            return launch(modulated_norm_kernel<T, decltype(numbers)::value, decltype(vectors)::value>, blocks, threads, 0,
                          stream, /*overlapped=*/true, x, static_cast<const T*>(weight), scale, y, static_cast<int>(width), eps);
        });
    });
}

cudaError_t gated_residual(Type type, Rows x, Rows y, const void* weight, Factors gate, void* sum, const void* next_weight,
                           Factors next_scale, Written normed, int64_t outer, int64_t inner, int64_t width, float eps,
                           cudaStream_t stream) {
    if (outer > kOuterMax) return cudaErrorNotSupported;
    const dim3 blocks(static_cast<unsigned>(inner), static_cast<unsigned>(outer));
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const bool aligned =
            tiles<T>(width, {x.data, y.data, weight, gate.data, sum, next_weight, next_scale.data, normed.plain, normed.fp8},
                     {outer > 1 ? x.outer_stride : 0, x.inner_stride, outer > 1 ? y.outer_stride : 0, y.inner_stride, gate.stride,
                      next_scale.stride});
        return launch_rows<T>(aligned, outer * inner, width, [&](auto numbers, auto vectors, int threads) {
            return launch(gated_residual_kernel<T, decltype(numbers)::value, decltype(vectors)::value>, blocks, threads, 0,
                          stream, /*overlapped=*/true, x, y, static_cast<const T*>(weight), gate, static_cast<T*>(sum),
                          static_cast<const T*>(next_weight), next_scale, normed, static_cast<int>(width), eps);
        });
    });
}

cudaError_t modulated_layer_norm(Type type, Rows x, Factors scale, void* y, int64_t outer, int64_t inner, int64_t width,
                                 float eps, cudaStream_t stream) {
    if (outer > kOuterMax) return cudaErrorNotSupported;
    const dim3 blocks(static_cast<unsigned>(inner), static_cast<unsigned>(outer));
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const bool aligned =
            tiles<T>(width, {x.data, scale.data, y}, {outer > 1 ? x.outer_stride : 0, x.inner_stride, scale.stride});
        return launch_rows<T>(aligned, outer * inner, width, [&](auto numbers, auto vectors, int threads) {
            return launch(modulated_layer_norm_kernel<T, decltype(numbers)::value, decltype(vectors)::value>, blocks, threads, 0,
                          stream, /*overlapped=*/true, x, scale, static_cast<T*>(y), static_cast<int>(width), eps);
        });
    });
}

}  // namespace diffusionz::kernels
