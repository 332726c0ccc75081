// y = x W^T + b where a row of y depends on its row of x alone: on the CPU bit for bit, whatever the number of rows and threads.
//
// On the CPU in float32 the weight is packed into panels once and multiplied by our own loop (simd_tile.h); elsewhere, and with
// DIFFUSIONZ_DISABLE_KERNELS=invariant_linear, it is at::linear, the reference, which rounds by the number of rows.
#pragma once

#include <ATen/core/Tensor.h>

#include "core/weights.h"

namespace diffusionz {

class InvariantLinear {
public:
    InvariantLinear() = default;
    // weight [out, in], bias [out] or undefined, on the host in float32; the product is computed in the placement's dtype.
    InvariantLinear(const at::Tensor& weight, const at::Tensor& bias, Placement placement);

    // x float32 [rows, in], whose rows may lie apart, to float32 [rows, out].
    at::Tensor operator()(const at::Tensor& x) const;
    // max(y, 0).
    at::Tensor relu(const at::Tensor& x) const;
    // sum [rows, out] += y.
    void add_to(at::Tensor sum, const at::Tensor& x) const;

    // Whether the weight is packed: the case in which rows do not depend on each other.
    bool packed() const { return packed_; }
    // [out, in] in the placement's dtype; of a packed one nothing that anyone else could read.
    const at::Tensor& weight() const { return weight_; }
    const at::Tensor& bias() const { return bias_; }  // float32, or undefined
    size_t nbytes() const { return weight_.defined() ? weight_.nbytes() + (bias_.defined() ? bias_.nbytes() : 0) : 0; }

private:
    enum class Finish { none, relu };
    void multiply(const at::Tensor& x, at::Tensor& y, bool accumulate, Finish finish) const;
    at::Tensor reference(const at::Tensor& x) const;

    at::Tensor weight_;  // [out, in], or packed: [panels, in, panel_width]
    at::Tensor bias_;    // float32
    int64_t out_features_ = 0;
    bool packed_ = false;
};

}  // namespace diffusionz
