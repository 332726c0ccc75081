#include "ops/attention.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace diffusionz {

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
    // ATen's fused attention takes [batch, heads, tokens, head_dim] as strided views.
    const int64_t repeats = q.size(2) / k.size(2);
    const auto heads_first = [&](const at::Tensor& x, int64_t times) {
        return (times == 1 ? x : x.repeat_interleave(times, 2)).transpose(1, 2);
    };
    const at::Tensor y = at::scaled_dot_product_attention(heads_first(q, 1), heads_first(k, repeats), heads_first(v, repeats), {}, 0.0, causal);
    return y.transpose(1, 2).flatten(2);
}

at::Tensor rope_interleaved(const at::Tensor& x, const at::Tensor& table) {
    const at::Tensor pairs = at::view_as_complex(x.to(at::kFloat).unflatten(-1, {x.size(-1) / 2, 2}).contiguous());
    return at::view_as_real(pairs * table.unsqueeze(1)).flatten(-2).to(x.scalar_type());
}

at::Tensor rope_halves(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
    const auto halves = x.chunk(2, -1);
    const at::Tensor rotated = at::cat({halves[1].neg(), halves[0]}, -1);
    return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1);
}

}  // namespace diffusionz
