// Launches of norm_conv2d.cu.
#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// A 3x3 convolution with padding of silu(x * factors[0] + factors[1]), what group_norm_apply gives, to `out` (at most 3) channels.
// x [batch, height, width, in], weight [out, 3, 3, in], channels-last; factors float [batch, in, 2].
// Without `pixels` y [batch, height, width, out] of `type`; with it y uint8 [batch, height, width, out], 255 (result + 1) / 2
// clamped and rounded to the nearest, to even between two.
// cudaErrorNotSupported but for 16-bit types, `in` of 32, 64, 96 or 128 and pointers at multiples of 16.
cudaError_t norm_conv2d(Type type, const void* x, const float* factors, const void* weight, const void* bias, void* y, bool pixels,
                        int64_t batch, int64_t height, int64_t width, int64_t in, int64_t out, cudaStream_t stream);

}  // namespace diffusionz::kernels
