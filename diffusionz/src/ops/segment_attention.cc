#include "ops/segment_attention.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "ops/disabled.h"
#include "ops/simd_tile.h"
#include "ops/vector_math.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/segment_attention.h"
#include "ops/cuda.h"
#endif

namespace diffusionz {
namespace {

// Runs of segments of one size are one batched call.
at::Tensor segment_attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t heads,
                                       const std::vector<Segment>& segments, at::ScalarType dtype) {
    at::Tensor y = at::empty(q.sizes(), q.options());
    const int64_t head_dim = q.size(1) / heads;
    for (size_t first = 0; first < segments.size();) {
        const Segment& segment = segments[first];
        size_t last = first + 1;
        while (last < segments.size() && segments[last].query_count == segment.query_count &&
               segments[last].key_count == segment.key_count)
            ++last;
        const int64_t batch = static_cast<int64_t>(last - first);
        const auto heads_first = [&](const at::Tensor& x, int64_t begin, int64_t count) {
            return x.narrow(0, begin, batch * count).to(dtype).reshape({batch, count, heads, head_dim}).transpose(1, 2);
        };
        const at::Tensor part = at::scaled_dot_product_attention(
            heads_first(q, segment.query_begin, segment.query_count), heads_first(k, segment.key_begin, segment.key_count),
            heads_first(v, segment.key_begin, segment.key_count), {}, 0.0, /*is_causal=*/false, /*scale=*/1.0);
        y.narrow(0, segment.query_begin, batch * segment.query_count)
            .copy_(part.transpose(1, 2).reshape({batch * segment.query_count, heads * head_dim}));
        first = last;
    }
    return y;
}

#ifdef DIFFUSIONZ_WITH_CUDA

constexpr size_t kSegmentsMax = 65535;

// By the kernel of row_attention, with a table of the segments.
at::Tensor segment_attention_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t heads,
                                  const std::vector<Segment>& segments, at::ScalarType dtype) {
    constexpr int64_t kFields = sizeof(kernels::AttentionSegment) / sizeof(int32_t);
    const auto count = static_cast<int64_t>(segments.size());
    const at::Tensor table = at::empty({count, kFields}, at::TensorOptions().dtype(at::kInt).pinned_memory(true));
    auto* entries = reinterpret_cast<kernels::AttentionSegment*>(table.mutable_data_ptr<int32_t>());
    int64_t query_count = 0;
    for (const Segment& segment : segments) {
        *entries++ = {static_cast<int32_t>(segment.query_begin), static_cast<int32_t>(segment.query_count),
                      static_cast<int32_t>(segment.key_begin), static_cast<int32_t>(segment.key_count), 1};
        query_count = std::max(query_count, segment.query_count);
    }
    const at::Tensor on_device = table.to(q.device(), /*non_blocking=*/true);
    const at::Tensor own_q = q.to(dtype), own_k = k.to(dtype), own_v = v.to(dtype);
    at::Tensor y = at::empty(q.sizes(), own_q.options());
    kernels::SegmentAttentionArguments p{};
    p.type = kernel_type(dtype);
    p.q = own_q.const_data_ptr(), p.k = own_k.const_data_ptr(), p.v = own_v.const_data_ptr(), p.y = y.mutable_data_ptr();
    p.q_stride = own_q.stride(0), p.kv_stride = own_k.stride(0), p.y_stride = y.stride(0);
    p.heads = static_cast<int32_t>(heads);
    p.segments = reinterpret_cast<const kernels::AttentionSegment*>(on_device.const_data_ptr<int32_t>());
    p.segment_count = static_cast<int32_t>(count);
    p.query_count = static_cast<int32_t>(query_count);
    check_launch("segment_attention", kernels::segment_attention(p, current_stream(q)));
    return y.to(at::kFloat);
}

#endif

// scores[0 .. count) become exp(score - max), and their sum is returned.
DIFFUSIONZ_VECTORIZED float exponentials(float* scores, int64_t count) {
    constexpr int64_t kLanes = 16;
    float top = scores[0];
    for (int64_t i = 1; i < count; ++i) top = scores[i] > top ? scores[i] : top;
    for (int64_t i = 0; i < count; ++i) scores[i] = exp_approx(scores[i] - top);
    float partial[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) partial[lane] += scores[i + lane];
    }
    float sum = 0.0f;
    for (; i < count; ++i) sum += scores[i];
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += partial[lane];
    return sum;
}

// One head of one segment. Keys are copied transposed into panels, values padded to whole panels: then both products are tiles.
class Head {
public:
    Head(int64_t head_dim, int64_t key_count)
        : head_dim_(head_dim),
          key_count_(key_count),
          width_(panel_width()),
          key_panels_((key_count + width_ - 1) / width_),
          value_panels_((head_dim + width_ - 1) / width_),
          keys_(static_cast<size_t>(key_panels_ * width_ * head_dim)),
          values_(static_cast<size_t>(key_count * value_panels_ * width_)),
          scores_(static_cast<size_t>(kTileRowsMax * key_panels_ * width_)) {}

    void load(const float* k, int64_t k_stride, const float* v, int64_t v_stride) {
        for (int64_t key = 0; key < key_count_; ++key) {
            float* panel = keys_.data() + key / width_ * width_ * head_dim_ + key % width_;
            for (int64_t i = 0; i < head_dim_; ++i) panel[i * width_] = k[key * k_stride + i];
            std::copy_n(v + key * v_stride, head_dim_, values_.data() + key * value_panels_ * width_);
        }
    }

    void attend(const float* q, int64_t q_stride, int64_t query_count, float* y, int64_t y_stride) {
        const int64_t row = key_panels_ * width_, value_row = value_panels_ * width_;
        float out[kTileRowsMax * kPanelWidthMax], factor[kTileRowsMax];
        for (int64_t begin = 0; begin < query_count; begin += kTileRowsMax) {
            const int64_t count = std::min(kTileRowsMax, query_count - begin);
            for (int64_t panel = 0; panel < key_panels_; ++panel)
                multiply_tile(count, q + begin * q_stride, q_stride, keys_.data() + panel * width_ * head_dim_, width_,
                              scores_.data() + panel * width_, row, head_dim_, false);
            for (int64_t r = 0; r < count; ++r) factor[r] = 1.0f / exponentials(scores_.data() + r * row, key_count_);
            for (int64_t panel = 0; panel < value_panels_; ++panel) {
                multiply_tile(count, scores_.data(), row, values_.data() + panel * width_, value_row, out, width_, key_count_,
                              false);
                const int64_t valid = std::min(width_, head_dim_ - panel * width_);
                for (int64_t r = 0; r < count; ++r) {
                    float* target = y + (begin + r) * y_stride + panel * width_;
                    for (int64_t j = 0; j < valid; ++j) target[j] = out[r * width_ + j] * factor[r];
                }
            }
        }
    }

private:
    int64_t head_dim_, key_count_, width_, key_panels_, value_panels_;
    std::vector<float> keys_, values_, scores_;
};

}  // namespace

at::Tensor segment_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t heads,
                             const std::vector<Segment>& segments, at::ScalarType dtype) {
    const bool disabled = kernel_disabled("segment_attention");
#ifdef DIFFUSIONZ_WITH_CUDA
    if (q.is_cuda() && (dtype == at::kHalf || dtype == at::kBFloat16) && q.size(1) == heads * 64 &&
        segments.size() <= kSegmentsMax && !disabled)
        return segment_attention_cuda(q, k, v, heads, segments, dtype);
#endif
    if (!q.is_cpu() || dtype != at::kFloat || disabled) return segment_attention_reference(q, k, v, heads, segments, dtype);

    at::Tensor y = at::empty(q.sizes(), q.options());
    const int64_t head_dim = q.size(1) / heads;
    const float *queries = q.const_data_ptr<float>(), *keys = k.const_data_ptr<float>(), *values = v.const_data_ptr<float>();
    float* out = y.mutable_data_ptr<float>();
    at::parallel_for(0, static_cast<int64_t>(segments.size()) * heads, 1, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            const Segment& segment = segments[static_cast<size_t>(task / heads)];
            const int64_t column = task % heads * head_dim;
            Head head(head_dim, segment.key_count);
            head.load(keys + segment.key_begin * k.stride(0) + column, k.stride(0),
                      values + segment.key_begin * v.stride(0) + column, v.stride(0));
            head.attend(queries + segment.query_begin * q.stride(0) + column, q.stride(0), segment.query_count,
                        out + segment.query_begin * y.stride(0) + column, y.stride(0));
        }
    });
    return y;
}

}  // namespace diffusionz
