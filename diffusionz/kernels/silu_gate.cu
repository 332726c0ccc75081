// The gate of a SwiGLU feed-forward (Shazeer 2020): y = a / (1 + e^-a) * b, with a and b the halves of a row.
//
// Without FP8 each thread has one vector of 16 bytes of either half. With it a block has a row, whose numbers stay in registers
// until their largest is known.
//
// Numbers: float32, rounded once. For numbers of 16 bits the exponential and the division are the hardware's approximations, a
// few units in the last place of float32, thousands of times finer than the result; for float32 they are the exact functions.
// Limits: with FP8 those of launch_rows. Reference: ops/silu_gate.cc.

#include "kernels/rows.cuh"
#include "kernels/silu_gate.h"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kThreads = 256;

template <class T>
__device__ inline float gate(float a, float b) {
    if constexpr (sizeof(T) == 4) {
        return a / (1.0f + expf(-a)) * b;
    } else {
        return __fdividef(a, 1.0f + __expf(-a)) * b;
    }
}

template <class T, int N>
__device__ inline void gate(const Vector<T, N>& a, const Vector<T, N>& b, float (&y)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = gate<T>(to_float(a.values[i]), to_float(b.values[i]));
}

template <class T, int N>
__global__ void __launch_bounds__(kThreads) silu_gate_kernel(const T* x, T* y, int count, unsigned blocks_a_row) {
    between_kernels();
    const int64_t row = blockIdx.x / blocks_a_row;
    const int index = static_cast<int>(blockIdx.x % blocks_a_row) * kThreads + threadIdx.x;
    if (index >= count) return;
    const auto a = load_once<T, N>(x, row * 2 * count + index), b = load_once<T, N>(x, (row * 2 + 1) * count + index);
    float numbers[N];
    gate(a, b, numbers);
    store(y, row * count + index, numbers);
}

template <class T, int N, int V>
__global__ void __launch_bounds__(kRowThreadsMax<V>) silu_gate_fp8_kernel(const T* x, Written y, int count) {
    __shared__ float scratch[32];
    between_kernels();
    const int64_t row = blockIdx.x;
    Vector<T, N> a[V], b[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int index = threadIdx.x + v * blockDim.x;
        if (index >= count) break;
        a[v] = load_once<T, N>(x, row * 2 * count + index);
        b[v] = load_once<T, N>(x, (row * 2 + 1) * count + index);
    }
    float numbers[V][N], largest = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int index = threadIdx.x + v * blockDim.x;
        if (index >= count) break;
        gate(a[v], b[v], numbers[v]);
#pragma unroll
        for (int i = 0; i < N; ++i) largest = fmaxf(largest, fabsf(numbers[v][i]));
        if (y.plain) store(static_cast<T*>(y.plain), row * count + index, numbers[v]);
    }
    const float scale = fp8_scale(block_max(largest, scratch));
    if (threadIdx.x == 0) y.row_scales[row] = scale;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int index = threadIdx.x + v * blockDim.x;
        if (index >= count) break;
        store_fp8(y.fp8, row * count + index, numbers[v], 1.0f / scale);
    }
}

template <class T, int N>
cudaError_t launch_plain(const T* x, T* y, int64_t rows, int64_t width, cudaStream_t stream) {
    const int64_t count = width / N, blocks_a_row = (count + kThreads - 1) / kThreads;
    if (rows * blocks_a_row > INT32_MAX || 2 * count > INT32_MAX) return cudaErrorNotSupported;
    return launch(silu_gate_kernel<T, N>, dim3(static_cast<unsigned>(rows * blocks_a_row)), kThreads, 0, stream,
                  /*overlapped=*/true, x, y, static_cast<int>(count), static_cast<unsigned>(blocks_a_row));
}

}  // namespace

cudaError_t silu_gate(Type type, const void* x, Written y, int64_t rows, int64_t width, cudaStream_t stream) {
    if (rows == 0 || width == 0) return cudaSuccess;
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        const auto* in = static_cast<const T*>(x);
        const bool aligned = tiles<T>(width, {x, y.plain, y.fp8}, {});
        if (!y.fp8) {
            auto* out = static_cast<T*>(y.plain);
            return aligned ? launch_plain<T, Vector<T>::kCount>(in, out, rows, width, stream)
                           : launch_plain<T, 1>(in, out, rows, width, stream);
        }
        return launch_rows<T>(aligned, rows, width, [&](auto numbers, auto vectors, int threads) {
            constexpr int N = decltype(numbers)::value;
            return launch(silu_gate_fp8_kernel<T, N, decltype(vectors)::value>, dim3(static_cast<unsigned>(rows)), threads, 0,
                          stream, /*overlapped=*/true, in, y, static_cast<int>(width / N));
        });
    });
}

}  // namespace diffusionz::kernels
