#include "ops/gated_linear.h"

#include "ops/quantize_rows.h"
#include "ops/silu_gate.h"

namespace diffusionz {

Activation gated_linear(const Linear& w13, const Activation& given, const LoraPairs* lora, Form form) {
    const Activation x = w13.readable(given);
    // An adapter's correction comes before the gate.
    const bool adapted = lora && lora->count(&w13) > 0;
    const at::Tensor y = adapted ? at::Tensor() : w13.own_product(x, true);
    if (!y.defined()) return silu_gate(w13(x, lora), form);
    return form == Form::plain ? Activation(y) : quantize_rows(y, form);
}

}  // namespace diffusionz
