// softmax(q k^T * scale) v, and the rotary embeddings that come before it.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// q [batch, tokens, heads, head_dim], k and v [batch, tokens, kv_heads, head_dim], heads a multiple of kv_heads (grouped queries).
// Returns [batch, tokens, heads * head_dim]. Scale 1/sqrt(head_dim).
at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal);

// Rotates interleaved pairs (x[2i], x[2i+1]) by complex `table` [tokens, head_dim / 2], in float32, cast back. x [batch, tokens, heads, head_dim].
at::Tensor rope_interleaved(const at::Tensor& x, const at::Tensor& table);

// Rotates halves (x[i], x[i + head_dim/2]) as GPT-NeoX and Qwen do; cos, sin [tokens, head_dim], in x's dtype.
at::Tensor rope_halves(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

}  // namespace diffusionz
