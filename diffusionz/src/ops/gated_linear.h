// The first half of a SwiGLU feed-forward (Shazeer 2020): silu(x W1^T) * (x W3^T), with W1 and W3 stacked in one layer.
#pragma once

#include "ops/activation.h"
#include "ops/linear.h"

namespace diffusionz {

// silu_gate(w13(x, lora), form): x [..., in] to [..., out / 2].
Activation gated_linear(const Linear& w13, const Activation& x, const LoraPairs* lora, Form form = Form::plain);

}  // namespace diffusionz
