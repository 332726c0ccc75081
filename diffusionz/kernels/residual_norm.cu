// y = s / sqrt(mean(s^2) + epsilon) of s = x + a + b, a row at a time: the norm before each product of Chronos-2, from its
// float32 residual stream into the type of the product's factors, with what products before it add to the stream. The norm's
// weight is part of the next product's. The stream itself is written only where it is asked for: of two sums behind each other,
// once.
//
// A warp has a row, and holds up to 1024 numbers of it in registers, so that it reads everything once. Few rows are a block each,
// so that each has a multiprocessor. All arithmetic is in float32; y is rounded once. Limits: width a multiple of 4. Reference:
// ops/residual_norm.cc.

#include "kernels/residual_norm.h"
#include "kernels/rows.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kWarps = 4, kHeld = 8;  // of a block, at most; vectors of 4 numbers that a lane keeps
constexpr int64_t kFewRows = 512;

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
__device__ inline void add(float4& x, const Four<T>* y, int at) {
    if (!y) return;
    const Four<T> more = y[at];
    x = {x.x + to_float(more.values[0]), x.y + to_float(more.values[1]), x.z + to_float(more.values[2]),
         x.w + to_float(more.values[3])};
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32) norm_kernel(ResidualNormArguments p) {
    between_kernels();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= p.rows) return;
    const int lane = threadIdx.x % 32, count = p.width / 4;
    float4* x = reinterpret_cast<float4*>(p.x + row * p.x_stride);
    const auto row_of = [&](const void* data) { return data ? static_cast<const Four<T>*>(data) + row * count : nullptr; };
    const Four<T>*a = row_of(p.a), *b = row_of(p.b);
    Four<T>* y = static_cast<Four<T>*>(p.y) + row * count;
    const auto sum_at = [&](int at) {
        float4 sum = x[at];
        add(sum, a, at);
        add(sum, b, at);
        return sum;
    };
    float4 held[kHeld];
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = i * 32 + lane < count ? sum_at(i * 32 + lane) : float4{};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) total += squares(held[i]);
    for (int at = kHeld * 32 + lane; at < count; at += 32) total += squares(sum_at(at));
    total = warp_combine(total, Sum());
    const float factor = rsqrtf(total / static_cast<float>(p.width) + p.epsilon);
    const auto write = [&](int at, const float4& sum) {
        if (p.keep) x[at] = sum;
        y[at] = scaled<T>(sum, factor);
    };
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
        if (i * 32 + lane < count) write(i * 32 + lane, held[i]);
    }
    for (int at = kHeld * 32 + lane; at < count; at += 32) write(at, sum_at(at));
}

template <class T>
cudaError_t run(const ResidualNormArguments& p, cudaStream_t stream) {
    const int warps = p.rows <= kFewRows ? 1 : kWarps;
    return launch(norm_kernel<T>, dim3(static_cast<unsigned>((p.rows + warps - 1) / warps)), warps * 32, 0, stream,
                  /*overlapped=*/true, p);
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
