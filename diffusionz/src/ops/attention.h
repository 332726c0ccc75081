// softmax(q k^T / sqrt(head_dim)) v.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// q [batch, tokens, heads, head_dim], k and v [batch, tokens, kv_heads, head_dim], heads a multiple of kv_heads (grouped queries,
// Ainslie et al. 2023). Returns [batch, tokens, heads * head_dim].
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal);

// The same without a mask by kernels/attention_sm90.cu, whether it pays or not; undefined where that does not take these.
at::Tensor attention_sm90(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);

}  // namespace diffusionz
