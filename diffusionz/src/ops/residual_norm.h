// The norm between a float32 residual stream and products in another precision.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// x / sqrt(mean(x^2) + eps) over the last dimension in float32, then in `dtype`. x float32 [rows, width], whose rows may lie
// apart. Reference: ATen, the path of the CPU (DIFFUSIONZ_DISABLE_KERNELS=residual_norm).
at::Tensor residual_norm(const at::Tensor& x, double eps, at::ScalarType dtype);

}  // namespace diffusionz
