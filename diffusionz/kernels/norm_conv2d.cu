// The end of a decoder in one read of its largest tensor: y[o, i, j] = bias[o] + sum over taps (a, b) and channels c of
// weight[o, a, b, c] silu(factor[c] x[c, i + a - 1, j + b - 1] + addend[c]), zeros outside the picture; then 8-bit pixels.
//
// With at most 3 outputs a convolution is a product of 27 rows, one an output and tap, with each pixel once, and sums of 9 shifted
// results: nine times fewer products and reads than tap by tap. A block takes kRows x kColumns pixels and their border. A warp's
// factor of 8 pixels x 32 channels is what its threads read from global memory, 8 channels each, since the order of channels in a
// product is free; the weights stay in registers, the results go to shared memory, where the taps are summed.
//
// Numbers: float32 from x to the factors of the products, which are rounded to x's type, and from there to the result.
// Reference: ops/norm_conv2d.cc.

#include "kernels/norm_conv2d.h"

#include "kernels/launch.cuh"
#include "kernels/mma.cuh"
#include "kernels/rows.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 16, kColumns = 32, kOuts = 3, kTaps = 9, kProducts = kOuts * kTaps;
constexpr int kAcross = kColumns + 2, kBordered = (kRows + 2) * kAcross;  // with the border
constexpr int kGroups = (kBordered + 7) / 8;                              // of 8 pixels
constexpr int kStride = kGroups * 8;  // of a row of results
static_assert(kStride % 32 == 8);     // four rows of a warp's stores, 8 banks each, are free of conflicts

// silu(number * factor + addend), two rounded numbers a register.
template <class T>
__device__ __forceinline__ void normalize(uint32_t (&pairs)[4], const Vector<T>& numbers, const float2* factors) {
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const float4 f = *reinterpret_cast<const float4*>(factors + i);
        values[i] = to_float(numbers.values[i]) * f.x + f.y;
        values[i + 1] = to_float(numbers.values[i + 1]) * f.z + f.w;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = __fdividef(values[i], 1.0f + __expf(-values[i]));
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pack<T>(values[2 * i], values[2 * i + 1]);
}

template <class T, int kIn, bool kPixels>
__global__ void __launch_bounds__(kThreads, 2)
    norm_conv2d_kernel(const T* x, const float2* factors, const T* weight, const T* bias, void* y, int height, int width, int out) {
    constexpr int kSteps = kIn / 32;
    extern __shared__ float products[];  // [kProducts][kStride]
    __shared__ alignas(16) float2 shared_factors[kIn];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // From the end to the beginning: of x the second-level cache still has the end.
    const int first_row = (gridDim.y - 1 - blockIdx.y) * kRows, first_column = blockIdx.x * kColumns;
    const int64_t image = static_cast<int64_t>(blockIdx.z) * height * width;
    wait_for_the_kernel_before();
    start_the_kernel_after();
    for (int c = threadIdx.x; c < kIn; c += kThreads) shared_factors[c] = factors[static_cast<int64_t>(blockIdx.z) * kIn + c];

    // Rows 3 tap + output; of each row and step a thread holds 8 channels.
    uint32_t w[2][2][kSteps][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int row = 8 * r + lane / 4, tap = row / kOuts, o = row % kOuts;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            uint4 numbers = make_uint4(0, 0, 0, 0);
            if (row < kProducts && o < out)
                numbers = *reinterpret_cast<const uint4*>(weight + (o * kTaps + tap) * kIn + 32 * k + 8 * (lane % 4));
            w[r / 2][r % 2][k][0] = numbers.x, w[r / 2][r % 2][k][1] = numbers.y;
            w[r / 2][r % 2][k][2] = numbers.z, w[r / 2][r % 2][k][3] = numbers.w;
        }
    }
    __syncthreads();

#pragma unroll 2
    for (int group = warp; group < kGroups; group += kWarps) {
        const int place = 8 * group + lane / 4;
        const int row = first_row + place / kAcross - 1, column = first_column + place % kAcross - 1;
        const bool inside = place < kBordered && row >= 0 && row < height && column >= 0 && column < width;
        const T* from = x + (image + static_cast<int64_t>(row) * width + column) * kIn;
        Vector<T> numbers[kSteps];
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            numbers[k] = Vector<T>{};
            if (inside) numbers[k] = load<T, 8>(from, 4 * k + lane % 4);
        }
        float sums[2][4] = {};
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            uint32_t pairs[4];
            normalize(pairs, numbers[k], shared_factors + 32 * k + 8 * (lane % 4));
#pragma unroll
            for (int i = 0; i < 4; ++i) pairs[i] = inside ? pairs[i] : 0u;  // the border of the normalised picture is zeros
#pragma unroll
            for (int s = 0; s < 2; ++s) {
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const uint32_t a[4] = {w[m][0][k][2 * s], w[m][1][k][2 * s], w[m][0][k][2 * s + 1], w[m][1][k][2 * s + 1]};
                    multiply<T>(sums[m], a, pairs[2 * s], pairs[2 * s + 1]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int product = 8 * r + lane / 4;
            if (product < kProducts) {
                *reinterpret_cast<float2*>(products + product * kStride + 8 * group + 2 * (lane % 4)) =
                    make_float2(sums[r / 2][r % 2 * 2], sums[r / 2][r % 2 * 2 + 1]);
            }
        }
    }
    __syncthreads();

    for (int p = threadIdx.x; p < kRows * kColumns; p += kThreads) {
        const int i = p / kColumns, j = p % kColumns, row = first_row + i, column = first_column + j;
        if (row >= height || column >= width) continue;
        const int64_t to = (image + static_cast<int64_t>(row) * width + column) * out;
#pragma unroll
        for (int o = 0; o < kOuts; ++o) {
            if (o >= out) break;
            float sum = to_float(bias[o]);
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap)
                sum += products[(tap * kOuts + o) * kStride + (i + tap / 3) * kAcross + j + tap % 3];
            if constexpr (kPixels)
                static_cast<uint8_t*>(y)[to + o] = static_cast<uint8_t>(rintf(__saturatef(0.5f * sum + 0.5f) * 255.0f));
            else
                static_cast<T*>(y)[to + o] = from_float<T>(sum);
        }
    }
}

template <class T, int kIn>
cudaError_t run(const void* x, const float* factors, const void* weight, const void* bias, void* y, bool pixels, int64_t batch,
                int64_t height, int64_t width, int64_t out, cudaStream_t stream) {
    constexpr int kBytes = kProducts * kStride * static_cast<int>(sizeof(float));
    const auto kernel = pixels ? norm_conv2d_kernel<T, kIn, true> : norm_conv2d_kernel<T, kIn, false>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>((width + kColumns - 1) / kColumns), static_cast<unsigned>((height + kRows - 1) / kRows),
                    static_cast<unsigned>(batch));
    return launch(kernel, grid, kThreads, kBytes, stream, /*overlapped=*/true, static_cast<const T*>(x),
                  reinterpret_cast<const float2*>(factors), static_cast<const T*>(weight), static_cast<const T*>(bias), y,
                  static_cast<int>(height), static_cast<int>(width), static_cast<int>(out));
}

}  // namespace

cudaError_t norm_conv2d(Type type, const void* x, const float* factors, const void* weight, const void* bias, void* y, bool pixels,
                        int64_t batch, int64_t height, int64_t width, int64_t in, int64_t out, cudaStream_t stream) {
    if (type == Type::float32 || out > kOuts || in % 32 != 0 || in > 128 || !tiles<__half>(in, {x, weight}, {}))
        return cudaErrorNotSupported;
    const auto call = [&](auto* tag, auto channels) {
        using T = std::remove_pointer_t<decltype(tag)>;
        return run<T, decltype(channels)::value>(x, factors, weight, bias, y, pixels, batch, height, width, out, stream);
    };
    const auto with_channels = [&](auto* tag) {
        switch (in) {
            case 32:
                return call(tag, std::integral_constant<int, 32>());
            case 64:
                return call(tag, std::integral_constant<int, 64>());
            case 96:
                return call(tag, std::integral_constant<int, 96>());
            default:
                return call(tag, std::integral_constant<int, 128>());
        }
    };
    return type == Type::float16 ? with_channels(static_cast<__half*>(nullptr)) : with_channels(static_cast<__nv_bfloat16*>(nullptr));
}

}  // namespace diffusionz::kernels
