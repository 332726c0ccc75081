// The end of a decoder: group normalisation, SiLU and a convolution to a few channels.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/conv2d.h"
#include "ops/group_norm.h"

namespace diffusionz {

// conv(silu(group_norm(x))) for a 3x3 `conv` with padding; `moments`: x's, where they are known. As [batch, out, height, width],
// or with `pixels` as uint8 [batch, height, width, out], -1 ... 1 being 0 ... 255.
at::Tensor norm_conv2d(const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias, int64_t groups,
                       double eps, const ChannelMoments& moments, const Conv2d& conv, bool pixels);

}  // namespace diffusionz
