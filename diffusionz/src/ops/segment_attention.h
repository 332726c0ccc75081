// softmax(q k^T) v within segments of tokens, without the 1 / sqrt(head_dim): T5's attention (Raffel et al. 2020), which
// Chronos-2 uses over time and over groups. Segments stand for the masks of a padded batch: nothing is computed that a mask would
// drop.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace diffusionz {

struct Segment {
    int64_t query_begin, query_count;
    int64_t key_begin, key_count;
};

// q float32 [query tokens, heads * head_dim], k and v float32 [key tokens, heads * head_dim], rows may lie apart. Each segment's
// queries attend to its keys; segments cover all queries. Products in `dtype`, on other devices than the CPU. Returns float32
// [query tokens, heads * head_dim]. On the CPU in float32 a segment's result depends on that segment alone, bit for bit.
// On CUDA in 16 bits and with heads of 64 it is kernels/segment_attention.cu.
// Reference: the ATen path (DIFFUSIONZ_DISABLE_KERNELS=segment_attention).
at::Tensor segment_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t heads,
                             const std::vector<Segment>& segments, at::ScalarType dtype);

}  // namespace diffusionz
