#include "ops/gated_linear.h"

#include "ops/silu_gate.h"

namespace diffusionz {

Activation gated_linear(const Linear& w13, const Activation& x, const LoraPairs* lora, Form form) {
    return silu_gate(w13(x, lora), form);
}

}  // namespace diffusionz
