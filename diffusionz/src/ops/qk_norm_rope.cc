// Queries and keys of a fused product, normalised and rotated. Reference: rms_norm and rope.h, which are also the path of the CPU.

#include "ops/qk_norm_rope.h"

#include <ATen/Functions.h>

#include "ops/rms_norm.h"
#include "ops/rope.h"

namespace diffusionz {
namespace {

// part [batch, tokens, heads, head_dim], a view of the fused product.
void rotate_reference(at::Tensor part, const at::Tensor& weight, double eps, const at::Tensor& table, RopePairs pairs) {
    const at::Tensor normed = weight.defined() ? rms_norm(part, weight, eps) : part;
    if (pairs == RopePairs::interleaved) {
        part.copy_(rope_interleaved(normed, table));
        return;
    }
    const auto both_halves = [&](const at::Tensor& numbers) { return at::cat({numbers, numbers}, -1).to(part.scalar_type()); };
    part.copy_(rope_halves(normed, both_halves(at::real(table)), both_halves(at::imag(table))));
}

}  // namespace

at::Tensor qk_norm_rope(at::Tensor qkv, const at::Tensor& q_weight, const at::Tensor& k_weight, double eps, const at::Tensor& table,
                        int64_t heads, int64_t kv_heads, RopePairs pairs) {
    const int64_t d = 2 * table.size(-1);
    rotate_reference(qkv.narrow(-1, 0, heads * d).unflatten(-1, {heads, d}), q_weight, eps, table, pairs);
    rotate_reference(qkv.narrow(-1, heads * d, kv_heads * d).unflatten(-1, {kv_heads, d}), k_weight, eps, table, pairs);
    return qkv;
}

}  // namespace diffusionz
