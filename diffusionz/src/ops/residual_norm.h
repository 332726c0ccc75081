// The norm between a float32 residual stream and products in another precision.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// x / sqrt(mean(x^2) + eps) * weight over the last dimension in float32, then in `dtype`. x float32 [rows, width], whose rows may
// lie apart; weight float32 [width]. Where `delta` [rows, width], in `dtype`, is defined, x += delta comes first. Reference:
// ATen, the path of the CPU (DIFFUSIONZ_DISABLE_KERNELS=residual_norm).
at::Tensor residual_norm(at::Tensor x, const at::Tensor& delta, const at::Tensor& weight, double eps, at::ScalarType dtype);

}  // namespace diffusionz
