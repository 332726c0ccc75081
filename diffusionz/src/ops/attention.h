// softmax(q k^T / sqrt(head_dim)) v.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// q [batch, tokens, heads, head_dim], k and v [batch, tokens, kv_heads, head_dim], heads a multiple of kv_heads (grouped queries,
// Ainslie et al. 2023). Returns [batch, tokens, heads * head_dim].
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal);

}  // namespace diffusionz
