#include "ops/rope.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>

#include <algorithm>

#include "ops/vector_math.h"

namespace diffusionz {
namespace {

DIFFUSIONZ_VECTORIZED void rotate_halves(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cos[i] - second * sin[i];
        x[i + half] = second * cos[i] + first * sin[i];
    }
}

}  // namespace

at::Tensor rope_interleaved(const at::Tensor& x, const at::Tensor& table) {
    const at::Tensor pairs = at::view_as_complex(x.to(at::kFloat).unflatten(-1, {x.size(-1) / 2, 2}).contiguous());
    return at::view_as_real(pairs * table.unsqueeze(1)).flatten(-2).to(x.scalar_type());
}

at::Tensor rope_halves(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
    const auto halves = x.chunk(2, -1);
    const at::Tensor rotated = at::cat({halves[1].neg(), halves[0]}, -1);
    return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1);
}

void rope_halves_at(at::Tensor x, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& positions) {
    if (!x.is_cpu()) {
        const at::Tensor c = cos.index_select(0, positions).unsqueeze(1), s = sin.index_select(0, positions).unsqueeze(1);
        const auto halves = x.chunk(2, -1);
        x.copy_(at::cat({halves[0] * c - halves[1] * s, halves[1] * c + halves[0] * s}, -1));
        return;
    }
    const int64_t heads = x.size(1), half = x.size(2) / 2;
    const int64_t* at_position = positions.const_data_ptr<int64_t>();
    const float *cosines = cos.const_data_ptr<float>(), *sines = sin.const_data_ptr<float>();
    float* data = x.mutable_data_ptr<float>();
    constexpr int64_t kGrainElements = 32768;
    at::parallel_for(0, x.size(0), std::max<int64_t>(1, kGrainElements / (heads * half * 2)), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const int64_t row = at_position[token] * half;
            for (int64_t head = 0; head < heads; ++head)
                rotate_halves(data + token * x.stride(0) + head * x.stride(1), cosines + row, sines + row, half);
        }
    });
}

}  // namespace diffusionz
