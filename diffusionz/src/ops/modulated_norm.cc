// The normalisations around the sublayers of a modulated transformer block.
//
// Reference: the ATen operations below, which are also the path of the CPU, where rms_norm is one pass of its own.

#include "ops/modulated_norm.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "ops/quantize_rows.h"
#include "ops/rms_norm.h"

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

}  // namespace

Activation modulated_norm(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& scale, Form form) {
    return quantize_rows(modulated_norm_reference(x, weight, eps, scale), form);
}

Residual gated_residual(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight, double eps, const at::Tensor& gate,
                        const at::Tensor& next_weight, const at::Tensor& next_scale, Form form) {
    Residual result{sum_reference(x, y, weight, eps, gate), {}};
    if (next_weight.defined()) result.normed = quantize_rows(modulated_norm_reference(result.sum, next_weight, eps, next_scale), form);
    return result;
}

at::Tensor modulated_layer_norm(const at::Tensor& x, double eps, const at::Tensor& scale) {
    return at::layer_norm(x, {x.size(-1)}, {}, {}, eps) * scale;
}

}  // namespace diffusionz
