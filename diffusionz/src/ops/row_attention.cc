#include "ops/row_attention.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "ops/disabled.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/segment_attention.h"
#include "ops/cuda.h"
#endif

namespace diffusionz {
namespace {

// x [rows, tokens, heads * head_dim] to [rows, heads, tokens, head_dim].
at::Tensor heads_first(const at::Tensor& x, int64_t heads) { return x.unflatten(2, {heads, -1}).transpose(1, 2); }

at::Tensor rotated(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
    const auto halves = x.to(at::kFloat).chunk(2, -1);
    return at::cat({halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin}, -1).to(x.scalar_type());
}

at::Tensor row_attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t heads,
                                   const at::Tensor& valid, const at::Tensor& cos, const at::Tensor& sin) {
    const int64_t queries = q.size(1), keys = k.size(1), first = keys - queries;
    const at::Tensor mask = valid.to(at::kBool).unsqueeze(1).unsqueeze(1).expand({k.size(0), heads, queries, keys});
    const at::Tensor y = at::scaled_dot_product_attention(
        rotated(heads_first(q, heads), cos.narrow(0, first, queries), sin.narrow(0, first, queries)),
        rotated(heads_first(k, heads), cos.narrow(0, 0, keys), sin.narrow(0, 0, keys)), heads_first(v, heads), mask, 0.0,
        /*is_causal=*/false, /*scale=*/1.0);
    return y.transpose(1, 2).reshape(q.sizes());
}

}  // namespace

at::Tensor row_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t heads, const at::Tensor& valid,
                         const at::Tensor& cos, const at::Tensor& sin) {
#ifdef DIFFUSIONZ_WITH_CUDA
    constexpr int64_t kSegmentsMax = 65535;
    const bool ours = q.is_cuda() && (q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16) &&
                      q.size(2) == heads * 64 && q.size(0) <= kSegmentsMax && k.strides() == v.strides() &&
                      !kernel_disabled("row_attention");
    if (ours) {
        at::Tensor y = at::empty(q.sizes(), q.options());
        kernels::SegmentAttentionArguments p{};
        p.type = kernel_type(q.scalar_type());
        p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr(), p.y = y.mutable_data_ptr();
        p.q_stride = q.stride(1), p.kv_stride = k.stride(1), p.y_stride = y.stride(1);
        p.heads = static_cast<int32_t>(heads);
        p.q_segment_stride = q.stride(0), p.kv_segment_stride = k.stride(0);
        p.segment_count = static_cast<int32_t>(q.size(0));
        p.query_count = static_cast<int32_t>(q.size(1)), p.key_count = static_cast<int32_t>(k.size(1));
        p.valid = valid.const_data_ptr<uint8_t>();
        p.cos = cos.const_data_ptr<float>(), p.sin = sin.const_data_ptr<float>();
        check_launch("segment_attention", kernels::segment_attention(p, current_stream(q)));
        return y;
    }
#endif
    return row_attention_reference(q, k, v, heads, valid, cos, sin);
}

}  // namespace diffusionz
