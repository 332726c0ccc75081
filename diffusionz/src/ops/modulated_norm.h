// The normalisations of a modulated transformer block, each with what stands around it in one pass over memory.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/activation.h"

namespace diffusionz {

// rms_norm(x, weight, eps) * scale. x [batch, tokens, width]; scale [batch or 1, 1, width] or undefined for none.
Activation modulated_norm(const at::Tensor& x, const at::Tensor& weight, double eps, const at::Tensor& scale,
                          Form form = Form::plain);

// What comes out of a sublayer, and what the next one reads.
struct Residual {
    at::Tensor sum;     // x + gate * rms_norm(y, weight, eps); without a weight x + gate * y; without a gate the gate is 1
    Activation normed;  // rms_norm(sum, next_weight, eps) * next_scale; empty without a next_weight
};

// x, y [batch, tokens, width]; gate, next_scale [batch or 1, 1, width] or undefined; weight, next_weight [width] or undefined.
// The result may share memory with y, never with x.
Residual gated_residual(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight, double eps, const at::Tensor& gate,
                        const at::Tensor& next_weight, const at::Tensor& next_scale, Form form = Form::plain);

// layer_norm(x, without parameters, eps) * scale. Shapes as in modulated_norm.
at::Tensor modulated_layer_norm(const at::Tensor& x, double eps, const at::Tensor& scale);

}  // namespace diffusionz
