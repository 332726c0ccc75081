// The gate of a SwiGLU feed-forward (Shazeer 2020).
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/activation.h"

namespace diffusionz {

// silu(first half) * second half of the last dimension: x [..., 2 width] to [..., width].
at::Tensor silu_gate(const at::Tensor& x);
// The same in the forms that a quantized product reads.
Activation silu_gate(const at::Tensor& x, Form form);

}  // namespace diffusionz
