// Queries and keys of a fused product, normalised and rotated where they stand.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// Which numbers of a head rotate together: (x[2i], x[2i + 1]) or (x[i], x[i + head_dim / 2]).
enum class RopePairs { interleaved, halves };

// qkv [batch, tokens, (heads + 2 kv_heads) * head_dim], contiguous: heads of queries, then of keys, then of values. Each head of
// queries and keys becomes rms_norm(head, weight, eps) (q_weight, k_weight [head_dim]; undefined for no norm), then is rotated by
// `table` [tokens, head_dim / 2] complex64 (Su et al. 2021). Values stay. In place: the result is `qkv`.
at::Tensor qk_norm_rope(at::Tensor qkv, const at::Tensor& q_weight, const at::Tensor& k_weight, double eps,
                        const at::Tensor& table, int64_t heads, int64_t kv_heads, RopePairs pairs);

}  // namespace diffusionz
