// Rotary position embeddings (Su et al. 2021), in the two layouts that the models use.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// Rotates interleaved pairs (x[2i], x[2i+1]) by complex `table` [tokens, head_dim / 2], in float32, cast back. x [batch, tokens,
// heads, head_dim].
at::Tensor rope_interleaved(const at::Tensor& x, const at::Tensor& table);

// Rotates halves (x[i], x[i + head_dim / 2]) as GPT-NeoX and Qwen do; cos, sin [tokens, head_dim], in x's dtype.
at::Tensor rope_halves(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

// The same in place for tokens packed from many sequences: x float32 [tokens, heads, head_dim], strided, token i at positions[i];
// cos and sin float32 [positions, head_dim / 2]. On the CPU one pass over x; elsewhere ATen.
void rope_halves_at(at::Tensor x, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& positions);

}  // namespace diffusionz
