// y = x / sqrt(mean(x^2) + eps) * weight, a row at a time.
//
// Why our own on the CPU: as ATen operations it is five passes over memory and five times that the threads wait for each other,
// and a transformer block has six of them. Numbers: the sum of squares in float32, in as many partial sums as a vector has lanes.
// On CUDA kernels/modulated_norm.cu, without a scale. Reference: rms_norm_reference, which is also the path of the CPU in other
// precisions (DIFFUSIONZ_DISABLE_KERNELS=rms_norm).

#include "ops/rms_norm.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>

#include <cmath>

#include "ops/disabled.h"
#include "ops/vector_math.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/modulated_norm.h"
#include "ops/cuda.h"
#endif

namespace diffusionz {
namespace {

constexpr int64_t kGrainElements = 32768;  // ATen's: below it a second thread costs more than it brings

at::Tensor rms_norm_reference(const at::Tensor& x, const at::Tensor& weight, double eps) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor scale = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true).add_(eps));
    return (wide * scale).to(x.scalar_type()).mul_(weight);
}

DIFFUSIONZ_VECTORIZED void normalize_row(const float* x, const float* weight, float* y, int64_t width, float eps) {
    constexpr int64_t kLanes = 16;
    float partial[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) partial[lane] += x[i + lane] * x[i + lane];
    }
    float sum = 0.0f;
    for (; i < width; ++i) sum += x[i] * x[i];
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += partial[lane];
    const float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
    for (int64_t j = 0; j < width; ++j) y[j] = x[j] * scale * weight[j];
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
    const bool disabled = kernel_disabled("rms_norm");
#ifdef DIFFUSIONZ_WITH_CUDA
    if (x.is_cuda() && has_kernel_type(x) && goes_with(weight, x) && !disabled) {
        at::Tensor y = at::empty(x.sizes(), x.options());
        const std::optional<at::Tensor> view = as_batched_rows(x);
        const at::Tensor rows = view ? *view : x.contiguous().view({1, -1, x.size(-1)});
        if (launched("rms_norm", kernels::modulated_norm(kernel_type(x.scalar_type()), rows_of(rows), weight.const_data_ptr(), {},
                                                         {y.mutable_data_ptr()}, rows.size(0), rows.size(1), rows.size(2),
                                                         static_cast<float>(eps), current_stream(x))))
            return y;
    }
#endif
    // Rows may lie apart, as queries do in the fused product, but not their numbers.
    const bool ours =
        x.is_cpu() && x.scalar_type() == at::kFloat && x.stride(-1) == 1 && x.dim() >= 2 && x.dim() <= 4 && !disabled;
    if (!ours) return rms_norm_reference(x, weight, eps);

    at::Tensor y = at::empty(x.sizes(), x.options());
    const at::Tensor view = x.dim() == 4 ? x : x.dim() == 3 ? x.unsqueeze(0) : x.unsqueeze(0).unsqueeze(0);
    const int64_t width = view.size(3), inner = view.size(2), middle = view.size(1), rows = view.size(0) * middle * inner;
    const float* in = view.const_data_ptr<float>();
    const float* factors = weight.const_data_ptr<float>();
    float* out = y.mutable_data_ptr<float>();
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrainElements / width), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t offset =
                row % inner * view.stride(2) + row / inner % middle * view.stride(1) + row / inner / middle * view.stride(0);
            normalize_row(in + offset, factors, out + row * width, width, static_cast<float>(eps));
        }
    });
    return y;
}

}  // namespace diffusionz
