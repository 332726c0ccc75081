// Normalisations.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019). Statistics in float32; the product with
// `weight` (undefined: none) in x's dtype, as diffusers and transformers round.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

// GroupNorm, then SiLU when `silu`. x [batch, channels, height, width], channels-last in memory.
at::Tensor group_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t groups, double eps, bool silu);

}  // namespace diffusionz
