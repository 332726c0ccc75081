// Group normalisation with an optional SiLU behind it.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// GroupNorm (Wu and He 2018) of x [batch, channels, height, width], channels-last in memory and in the result; then y *
// sigmoid(y) when `silu`.
at::Tensor group_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t groups, double eps,
                      bool silu);

}  // namespace diffusionz
