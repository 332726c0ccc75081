// Launch of qk_norm_rope.cu.
#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// qkv [rows, row_stride], in place: each row begins with `heads` heads of queries and `kv_heads` of keys, each of head_dim
// numbers. Weights [head_dim] or null; table [tokens, head_dim / 2] pairs (cos, sin), row r at token r % tokens.
// cudaErrorNotSupported for heads that vectors of 16 bytes do not tile in halves, or that a warp does not hold.
cudaError_t qk_norm_rope(Type type, void* qkv, int64_t rows, int64_t row_stride, int64_t tokens, int64_t heads, int64_t kv_heads,
                         int64_t head_dim, const void* q_weight, const void* k_weight, float eps, const void* table,
                         bool interleaved, cudaStream_t stream);

}  // namespace diffusionz::kernels
