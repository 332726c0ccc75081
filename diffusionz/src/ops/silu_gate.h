// The gate of a SwiGLU feed-forward (Shazeer 2020).
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// silu(first half) * second half of the last dimension: x [..., 2 width] to [..., width].
at::Tensor silu_gate(const at::Tensor& x);

}  // namespace diffusionz
