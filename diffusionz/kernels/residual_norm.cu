// y = x / sqrt(mean(x^2) + epsilon), a row at a time: the norm before each product of Chronos-2, from its float32 residual stream
// into the type of the product's factors. The norm's weight is part of the product's.
//
// A warp has a row, and holds up to 1024 numbers of it in registers, so that it reads the stream once. All arithmetic is in
// float32; y is rounded once. Limits: width a multiple of 4. Reference: ops/residual_norm.cc.

#include "kernels/residual_norm.h"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kWarps = 4, kHeld = 8;  // vectors of 4 numbers that a lane keeps

template <class T>
struct alignas(4 * sizeof(T)) Four {
    T values[4];
};

__device__ inline float squares(const float4& x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }

template <class T>
__device__ inline Four<T> scaled(const float4& x, float factor) {
    return {from_float<T>(x.x * factor), from_float<T>(x.y * factor), from_float<T>(x.z * factor), from_float<T>(x.w * factor)};
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32) norm_kernel(ResidualNormArguments p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (row >= p.rows) return;
    const int lane = threadIdx.x % 32, count = p.width / 4;
    const float4* x = reinterpret_cast<const float4*>(p.x + row * p.x_stride);
    Four<T>* y = reinterpret_cast<Four<T>*>(p.y) + row * count;
    float4 held[kHeld];
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = i * 32 + lane < count ? x[i * 32 + lane] : float4{};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) total += squares(held[i]);
    for (int at = kHeld * 32 + lane; at < count; at += 32) total += squares(x[at]);
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    const float factor = rsqrtf(total / static_cast<float>(p.width) + p.epsilon);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        if (i * 32 + lane < count) y[i * 32 + lane] = scaled<T>(held[i], factor);
    }
    for (int at = kHeld * 32 + lane; at < count; at += 32) y[at] = scaled<T>(x[at], factor);
}

template <class T>
cudaError_t run(const ResidualNormArguments& p, cudaStream_t stream) {
    norm_kernel<T><<<static_cast<unsigned>((p.rows + kWarps - 1) / kWarps), kWarps * 32, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace

cudaError_t residual_norm(const ResidualNormArguments& p, cudaStream_t stream) {
    if (p.rows == 0) return cudaSuccess;
    switch (p.type) {
        case Type::float32:
            return run<float>(p, stream);
        case Type::float16:
            return run<__half>(p, stream);
        case Type::bfloat16:
            return run<__nv_bfloat16>(p, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace diffusionz::kernels
