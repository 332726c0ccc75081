// The norm between a float32 residual stream and products in another precision.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// s / sqrt(mean(s^2) + eps) over the last dimension in float32, then in `dtype`, of s = x + a + b. x float32 [rows, width], whose
// rows may lie apart; a and b [rows, width] in `dtype`, undefined for 0. `keep`: x becomes s. Reference: ATen, the path of the
// CPU (DIFFUSIONZ_DISABLE_KERNELS=residual_norm).
at::Tensor residual_norm(at::Tensor x, const at::Tensor& a, const at::Tensor& b, bool keep, double eps, at::ScalarType dtype);

}  // namespace diffusionz
