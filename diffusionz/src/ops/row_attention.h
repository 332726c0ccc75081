// softmax(rope(q) rope(k)^T) v within rows of one length, without the 1 / sqrt(head_dim): segment_attention where every segment
// is as long as the others, so that nothing about them has to go to the device, and with the rotation on the way.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// q [rows, queries, heads * head_dim], the last `queries` tokens of each row; k and v [rows, keys, heads * head_dim], both of one
// layout; tokens may lie apart. `valid` uint8 [rows, keys]: 0 where no query attends; each row has a key that is valid. cos and
// sin float32 [positions, head_dim / 2]: a row's first key is at position 0. Returns [rows, queries, heads * head_dim] in q's
// dtype. Reference: ATen, the path in float32, of other heads than 64, and on the CPU (DIFFUSIONZ_DISABLE_KERNELS=row_attention).
at::Tensor row_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t heads, const at::Tensor& valid,
                         const at::Tensor& cos, const at::Tensor& sin);

}  // namespace diffusionz
