#include "ops/attention.h"

#include <ATen/Functions.h>

namespace diffusionz {

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
    const int64_t repeats = q.size(2) / k.size(2);
    // ATen's fused attention takes [batch, heads, tokens, head_dim] as strided views.
    const auto heads_first = [](const at::Tensor& x, int64_t times) {
        return (times == 1 ? x : x.repeat_interleave(times, 2)).transpose(1, 2);
    };
    const at::Tensor y =
        at::scaled_dot_product_attention(heads_first(q, 1), heads_first(k, repeats), heads_first(v, repeats), {}, 0.0, causal);
    return y.transpose(1, 2).flatten(2);
}

}  // namespace diffusionz
