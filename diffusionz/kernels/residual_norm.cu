// x += delta; y = x / sqrt(mean(x^2) + epsilon) * weight, a row at a time: the norm before each product of Chronos-2, from its
// float32 residual stream into the type of the product's factors, with what the product before adds to the stream.
//
// A warp has a row, and holds up to 1024 numbers of it in registers, so that it reads the stream once. All arithmetic is in
// float32; y is rounded once. Limits: width a multiple of 4. Reference: ops/residual_norm.cc.

#include "kernels/launch.cuh"
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
__device__ inline float4 sum(float4 x, const Four<T>& y) {
    return {x.x + to_float(y.values[0]), x.y + to_float(y.values[1]), x.z + to_float(y.values[2]), x.w + to_float(y.values[3])};
}

template <class T>
__device__ inline Four<T> scaled(const float4& x, float factor, const float4& w) {
    return {from_float<T>(x.x * factor * w.x), from_float<T>(x.y * factor * w.y), from_float<T>(x.z * factor * w.z),
            from_float<T>(x.w * factor * w.w)};
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32) norm_kernel(ResidualNormArguments p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (row >= p.rows) return;
    const int lane = threadIdx.x % 32, count = p.width / 4;
    float4* x = reinterpret_cast<float4*>(p.x + row * p.x_stride);
    const Four<T>* delta = p.delta ? reinterpret_cast<const Four<T>*>(p.delta) + row * count : nullptr;
    Four<T>* y = reinterpret_cast<Four<T>*>(p.y) + row * count;
    const float4* weight = reinterpret_cast<const float4*>(p.weight);
    wait_for_the_kernel_before();
    float4 held[kHeld];
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = i * 32 + lane;
        held[i] = at < count ? x[at] : float4{};
    }
    if (delta) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const int at = i * 32 + lane;
            if (at < count) x[at] = held[i] = sum(held[i], delta[at]);
        }
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) total += squares(held[i]);
    for (int at = kHeld * 32 + lane; at < count; at += 32) {
        const float4 values = delta ? sum(x[at], delta[at]) : x[at];
        if (delta) x[at] = values;
        total += squares(values);
    }
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    const float factor = rsqrtf(total / static_cast<float>(p.width) + p.epsilon);
    start_the_kernel_after();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        const int at = i * 32 + lane;
        if (at < count) y[at] = scaled<T>(held[i], factor, weight[at]);
    }
    for (int at = kHeld * 32 + lane; at < count; at += 32) y[at] = scaled<T>(x[at], factor, weight[at]);
}

template <class T>
cudaError_t run(const ResidualNormArguments& p, cudaStream_t stream) {
    return launch(norm_kernel<T>, dim3((p.rows + kWarps - 1) / kWarps), kWarps * 32, 0, stream, p.overlapped, p);
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
