// Root-mean-square normalisation.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019). Statistics in float32; the product with
// `weight` in x's dtype, as diffusers and transformers round.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

}  // namespace diffusionz
