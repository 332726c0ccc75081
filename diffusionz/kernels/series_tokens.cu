// Rows of a time series as Chronos-2's patch features. A row is standardised by the mean and population standard deviation of
// what is observed (loc 0 and scale 1 for nothing, scale 1e-5 for a constant), z = arcsinh((x - loc) / scale), and cut into
// patches of three parts: time encoding (steps from now, over a scale), z (0 where missing), 1 where observed.
//
// Layout of a token's features, with d = 3 * patch:
//   float32:  z [d], 1, r, 0...                              r is 1 for the register token, whose other features are 0
//   16 bits:  high [d], low [d], high [d], 1, 1, r, r, 0...  z = high + low to 22 bits (bfloat16: 16 bits)
// so that one product with a weight laid out to match ([W high, W high, W low, bias high, low, register high, low]) gives the
// embedding with its bias, and the register's, to nearly float32: a value's rounding would stay in every layer.
//
// A block has a row. Sums are in float64, as on the CPU: in float32 the mean of many large numbers is off by more than their
// spread; the order of summation is fixed. Limits: less than 2^31 steps a row. Reference: ops/series_tokens.cc.

#include "kernels/rows.cuh"
#include "kernels/series_tokens.h"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kThreads = 256;
constexpr float kScaleOfConstant = 1e-5f;  // upstream's InstanceNorm

template <class T>
__device__ inline void write_feature(T* features, int at, int count, float value) {
    features[at] = from_float<T>(value);
    if constexpr (sizeof(T) == 2) {
        features[count + at] = from_float<T>(value - to_float(features[at]));
        features[2 * count + at] = features[at];
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) tokens_kernel(SeriesTokensArguments p) {
    __shared__ double parts[3][kThreads / 32];
    between_kernels();
    const int64_t row = blockIdx.x;
    const int steps = p.context_patches * p.patch, horizon = p.future_patches * p.patch;
    const float* context = p.context + row * steps;
    const float* future = p.future ? p.future + row * horizon : nullptr;
    double sum = 0.0, count = 0.0;
    for (int i = threadIdx.x; i < steps; i += kThreads) {
        const float value = context[i];
        if (isnan(value)) continue;
        sum += value;
        count += 1.0;
    }
    sum = block_sum(sum, parts[0]), count = block_sum(count, parts[1]);
    const float loc = count > 0.0 ? static_cast<float>(sum / count) : 0.0f;
    double squares = 0.0;
    for (int i = threadIdx.x; i < steps; i += kThreads) {
        const float value = context[i];
        if (isnan(value)) continue;
        const double deviation = static_cast<double>(value) - loc;
        squares += deviation * deviation;
    }
    squares = block_sum(squares, parts[2]);
    float scale = count > 0.0 ? static_cast<float>(sqrt(squares / count)) : 1.0f;
    if (scale == 0.0f) scale = kScaleOfConstant;
    if (threadIdx.x == 0) p.loc[row] = loc, p.scale[row] = scale;

    const int tokens = p.context_patches + p.register_token + p.future_patches, third = 3 * p.patch;
    constexpr int kTerms = sizeof(T) == 2 ? 3 : 1, kOnes = sizeof(T) == 2 ? 2 : 1;
    T* features = static_cast<T*>(p.features) + row * tokens * p.width;
    const T zero = from_float<T>(0.0f), one = from_float<T>(1.0f);
    for (int item = threadIdx.x; item < tokens * p.patch; item += kThreads) {
        const int token = item / p.patch, i = item % p.patch;
        T* out = features + static_cast<int64_t>(token) * p.width;
        const bool is_register = p.register_token && token == p.context_patches;
        const bool is_future = token >= p.context_patches + p.register_token;
        float time = 0.0f, value = NAN;
        if (token < p.context_patches) {
            value = context[item];
            time = static_cast<float>(item - steps);
        } else if (is_future) {
            const int at = item - (p.context_patches + p.register_token) * p.patch;
            if (future) value = future[at];
            time = static_cast<float>(at);
        }
        const bool known = !isnan(value);
        const float scaled = known ? static_cast<float>((static_cast<double>(value) - loc) / scale) : 0.0f;
        write_feature(out, i, third, time / p.time_encoding_scale);
        write_feature(out, p.patch + i, third, p.arcsinh ? asinhf(scaled) : scaled);
        write_feature(out, 2 * p.patch + i, third, known ? 1.0f : 0.0f);
        for (int at = kTerms * third + i; at < p.width; at += p.patch) {
            const int column = at - kTerms * third;
            out[at] = column < kOnes ? (is_register ? zero : one) : column < 2 * kOnes ? (is_register ? one : zero) : zero;
        }
    }
    for (int token = threadIdx.x; token < tokens; token += kThreads) {
        bool observed = token >= p.context_patches;
        for (int i = 0; !observed && i < p.patch; ++i) observed = !isnan(context[token * p.patch + i]);
        p.valid[row * tokens + token] = observed;
    }
}

template <class T>
cudaError_t run(const SeriesTokensArguments& p, cudaStream_t stream) {
    return launch(tokens_kernel<T>, dim3(static_cast<unsigned>(p.rows)), kThreads, 0, stream, /*overlapped=*/true, p);
}

}  // namespace

cudaError_t series_tokens(const SeriesTokensArguments& p, cudaStream_t stream) {
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
