// Queries and keys of a fused product, normalised and rotated: on CUDA kernels/qk_norm_rope.cu. Reference: rms_norm and rope.h,
// which are also the path of the CPU (DIFFUSIONZ_DISABLE_KERNELS=qk_norm_rope).

#include "ops/qk_norm_rope.h"

#include <ATen/Functions.h>

#include "ops/disabled.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/qk_norm_rope.h"
#include "ops/cuda.h"
#endif

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

at::Tensor qk_norm_rope(at::Tensor qkv, const at::Tensor& q_weight, const at::Tensor& k_weight, double eps,
                        const at::Tensor& table, int64_t heads, int64_t kv_heads, RopePairs pairs) {
    const int64_t d = 2 * table.size(-1);
#ifdef DIFFUSIONZ_WITH_CUDA
    const bool disabled = kernel_disabled("qk_norm_rope");
    const auto kernel_reads = [&](const at::Tensor& weight) {
        return !weight.defined() || (weight.scalar_type() == qkv.scalar_type() && weight.is_contiguous());
    };
    if (qkv.is_cuda() && has_kernel_type(qkv) && qkv.is_contiguous() && table.is_contiguous() && kernel_reads(q_weight) &&
        kernel_reads(k_weight) && !disabled) {
        if (launched("qk_norm_rope",
                     kernels::qk_norm_rope(kernel_type(qkv.scalar_type()), qkv.mutable_data_ptr(), qkv.size(0) * qkv.size(1),
                                           qkv.size(2), qkv.size(1), heads, kv_heads, d, data_of(q_weight), data_of(k_weight),
                                           static_cast<float>(eps), table.const_data_ptr(), pairs == RopePairs::interleaved,
                                           current_stream(qkv))))
            return qkv;
    }
#endif
    rotate_reference(qkv.narrow(-1, 0, heads * d).unflatten(-1, {heads, d}), q_weight, eps, table, pairs);
    rotate_reference(qkv.narrow(-1, heads * d, kv_heads * d).unflatten(-1, {kv_heads, d}), k_weight, eps, table, pairs);
    return qkv;
}

}  // namespace diffusionz
