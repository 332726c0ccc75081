// The normalisations around the sublayers of a modulated transformer block: on CUDA kernels/modulated_norm.cu.
//
// Reference: the ATen operations below, which are also the path of the CPU, where rms_norm is one pass of its own
// (DIFFUSIONZ_DISABLE_KERNELS=modulated_norm, gated_residual or modulated_layer_norm).

#include "ops/modulated_norm.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "ops/disabled.h"
#include "ops/quantize_rows.h"
#include "ops/rms_norm.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/modulated_norm.h"
#include "ops/cuda.h"
#endif

namespace diffusionz {
namespace {

at::Tensor modulated_norm_reference(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& scale) {
    at::Tensor y = rms_norm(x, weight, eps);
    return scale.defined() ? y.mul_(scale) : y;
}

at::Tensor sum_reference(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight, double eps, const at::Tensor& gate) {
    if (weight.defined()) return modulated_norm_reference(y, weight, eps, gate).add_(x);
    return gate.defined() ? (y * gate).add_(x) : x + y;
}

#ifdef DIFFUSIONZ_WITH_CUDA
bool kernel_reads(const at::Tensor& x) { return x.is_cuda() && has_kernel_type(x) && x.dim() == 3 && x.stride(-1) == 1; }
#endif

}  // namespace

Activation modulated_norm(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& scale, Form form) {
#ifdef DIFFUSIONZ_WITH_CUDA
    const bool disabled = kernel_disabled("modulated_norm");
    if (kernel_reads(x) && goes_with(weight, x) && goes_with(scale, x) && !disabled) {
        const WrittenActivation y(x, form);
        if (launched("modulated_norm", kernels::modulated_norm(kernel_type(x.scalar_type()), rows_of(x), data_of(weight),
                                                               factors_of(scale), y.written, x.size(0), x.size(1), x.size(2),
                                                               static_cast<float>(eps), current_stream(x))))
            return y.activation;
    }
#endif
    return quantize_rows(modulated_norm_reference(x, weight, eps, scale), form);
}

Residual gated_residual(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight, double eps, const at::Tensor& gate,
                        const at::Tensor& next_weight, const at::Tensor& next_scale, Form form) {
#ifdef DIFFUSIONZ_WITH_CUDA
    const bool disabled = kernel_disabled("gated_residual");
    if (kernel_reads(x) && kernel_reads(y) && x.sizes() == y.sizes() && goes_with(y, x) && goes_with(weight, x) &&
        goes_with(gate, x) && goes_with(next_weight, x) && goes_with(next_scale, x) && !disabled) {
        Residual result{at::empty(x.sizes(), x.options()), {}};
        std::optional<WrittenActivation> normed;
        if (next_weight.defined()) normed.emplace(x, form);
        if (launched("gated_residual",
                     kernels::gated_residual(kernel_type(x.scalar_type()), rows_of(x), rows_of(y), data_of(weight),
                                             factors_of(gate), result.sum.mutable_data_ptr(), data_of(next_weight),
                                             factors_of(next_scale), normed ? normed->written : kernels::Written{}, x.size(0),
                                             x.size(1), x.size(2), static_cast<float>(eps), current_stream(x)))) {
            if (normed) result.normed = normed->activation;
            return result;
        }
    }
#endif
    Residual result{sum_reference(x, y, weight, eps, gate), {}};
    if (next_weight.defined())
        result.normed = quantize_rows(modulated_norm_reference(result.sum, next_weight, eps, next_scale), form);
    return result;
}

at::Tensor modulated_layer_norm(const at::Tensor& x, double eps, const at::Tensor& scale) {
#ifdef DIFFUSIONZ_WITH_CUDA
    const bool disabled = kernel_disabled("modulated_layer_norm");
    if (kernel_reads(x) && goes_with(scale, x) && !disabled) {
        at::Tensor y = at::empty(x.sizes(), x.options());
        if (launched(
                "modulated_layer_norm",
                kernels::modulated_layer_norm(kernel_type(x.scalar_type()), rows_of(x), factors_of(scale), y.mutable_data_ptr(),
                                              x.size(0), x.size(1), x.size(2), static_cast<float>(eps), current_stream(x))))
            return y;
    }
#endif
    return at::layer_norm(x, {x.size(-1)}, {}, {}, eps) * scale;
}

}  // namespace diffusionz
