// Numbers to float8_e4m3fn with a scale a row: scale = max |x| / 448, or 1 for a row of zeros; fp8 = x / scale, to the nearest.
//
// A block a row, whose numbers stay in registers until their largest is known.
//
// Numbers: x is multiplied by the reciprocal of the scale in float32, rounded once. A NaN stays one, and a row with an infinity
// becomes zeros and NaN. Limits: those of launch_rows. Reference: ops/quantize_rows.cc.

#include "kernels/quantize_rows.h"
#include "kernels/rows.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

template <class T, int N, int V>
__global__ void __launch_bounds__(kRowThreadsMax<V>)
    quantize_rows_kernel(const T* x, uint8_t* fp8, float* row_scales, int count) {
    __shared__ float scratch[32];
    between_kernels();
    const int64_t row = blockIdx.x;
    Vector<T, N> vectors[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int index = threadIdx.x + v * blockDim.x;
        vectors[v] = index < count ? load_once<T, N>(x, row * count + index) : Vector<T, N>{};
    }
    float largest = 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int i = 0; i < N; ++i) largest = fmaxf(largest, fabsf(to_float(vectors[v].values[i])));
    }
    const float scale = fp8_scale(block_max(largest, scratch));
    if (threadIdx.x == 0) row_scales[row] = scale;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const int index = threadIdx.x + v * blockDim.x;
        if (index >= count) break;
        float numbers[N];
#pragma unroll
        for (int i = 0; i < N; ++i) numbers[i] = to_float(vectors[v].values[i]);
        store_fp8(fp8, row * count + index, numbers, 1.0f / scale);
    }
}

}  // namespace

cudaError_t quantize_rows(Type type, const void* x, uint8_t* fp8, float* row_scales, int64_t rows, int64_t width,
                          cudaStream_t stream) {
    if (rows > INT32_MAX) return cudaErrorNotSupported;
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        return launch_rows<T>(tiles<T>(width, {x, fp8}, {}), rows, width, [&](auto numbers, auto vectors, int threads) {
            constexpr int N = decltype(numbers)::value;
            return launch(quantize_rows_kernel<T, N, decltype(vectors)::value>, dim3(static_cast<unsigned>(rows)), threads, 0,
                          stream, /*overlapped=*/true, static_cast<const T*>(x), fp8, row_scales, static_cast<int>(width / N));
        });
    });
}

}  // namespace diffusionz::kernels
