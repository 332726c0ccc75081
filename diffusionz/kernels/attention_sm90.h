// Attention on Hopper's tensor cores: see attention_sm90.cu.
#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// bfloat16 [batch, tokens, heads, 128], heads side by side, tokens and batches any multiple of 16 bytes apart.
struct AttentionSm90 {
    Rows q, k, v;       // outer: batch, inner: token
    void* y = nullptr;  // contiguous [batch, queries, heads, 128]
    int64_t batch = 0, queries = 0, keys = 0, heads = 0, kv_heads = 0;
    float scale = 1.0f;  // of the logits, over 0
};

// Compute capability 9.0 only; sizes under 2^31; kv_heads divides heads. cudaErrorNotSupported where the driver cannot describe
// the tensors.
cudaError_t attention_sm90(const AttentionSm90& call, int multiprocessors, cudaStream_t stream);

}  // namespace diffusionz::kernels
