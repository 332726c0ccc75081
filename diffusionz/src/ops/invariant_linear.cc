#include "ops/invariant_linear.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>

#include <algorithm>

#include "ops/disabled.h"
#include "ops/simd_tile.h"

namespace diffusionz {
namespace {

// A task is a block of rows by two panels. Rows: what fits the second-level cache together with their part of k.
constexpr int64_t kBlockRows = 60;
constexpr int64_t kBlockPanels = 2;
// Of k at a time: a panel's part stays in the first-level cache while the block's rows pass over it. A chain goes on where it
// stopped, so the blocking does not show in the numbers.
constexpr int64_t kBlockDepth = 768;

}  // namespace

InvariantLinear::InvariantLinear(const at::Tensor& weight, const at::Tensor& bias, Placement placement)
    : out_features_(weight.size(0)) {
    if (bias.defined()) bias_ = bias.to(at::TensorOptions().device(placement.device).dtype(at::kFloat)).contiguous();
    packed_ = placement.device.is_cpu() && placement.dtype == at::kFloat && !kernel_disabled("invariant_linear");
    if (!packed_) {
        weight_ = weight.to(at::TensorOptions().device(placement.device).dtype(placement.dtype)).contiguous();
        return;
    }
    const int64_t width = panel_width(), panels = (out_features_ + width - 1) / width;
    const at::Tensor rows =
        panels * width == out_features_ ? weight : at::constant_pad_nd(weight, {0, 0, 0, panels * width - out_features_});
    weight_ = rows.reshape({panels, width, weight.size(1)}).transpose(1, 2).contiguous();
}

at::Tensor InvariantLinear::reference(const at::Tensor& x) const {
    const at::Tensor y = at::linear(x.to(weight_.scalar_type()), weight_).to(at::kFloat);
    return bias_.defined() ? y + bias_ : y;
}

at::Tensor InvariantLinear::operator()(const at::Tensor& x) const {
    if (!packed_) return reference(x);
    at::Tensor y = at::empty({x.size(0), out_features_}, x.options());
    multiply(x, y, /*accumulate=*/false, Finish::none);
    return y;
}

at::Tensor InvariantLinear::relu(const at::Tensor& x) const {
    if (!packed_) return reference(x).relu_();
    at::Tensor y = at::empty({x.size(0), out_features_}, x.options());
    multiply(x, y, /*accumulate=*/false, Finish::relu);
    return y;
}

void InvariantLinear::add_to(at::Tensor sum, const at::Tensor& x) const {
    if (packed_) {
        multiply(x, sum, /*accumulate=*/true, Finish::none);
    } else {
        sum.add_(reference(x));
    }
}

void InvariantLinear::multiply(const at::Tensor& x, at::Tensor& y, bool accumulate, Finish finish) const {
    TORCH_INTERNAL_ASSERT(x.stride(1) == 1 && y.stride(1) == 1);
    const int64_t width = panel_width(), panels = weight_.size(0), depth = weight_.size(1), rows = x.size(0);
    const int64_t row_blocks = (rows + kBlockRows - 1) / kBlockRows, panel_blocks = (panels + kBlockPanels - 1) / kBlockPanels;
    const int64_t lda = x.stride(0), ldc = y.stride(0);
    const float *a = x.const_data_ptr<float>(), *b = weight_.const_data_ptr<float>(),
                *bias = bias_.defined() ? bias_.const_data_ptr<float>() : nullptr;
    float* c = y.mutable_data_ptr<float>();

    // One tile of one panel over a part of k. Where the panel is wider than what is left of y, it is computed aside.
    const auto tile = [&](int64_t row, int64_t row_count, int64_t panel, int64_t begin, int64_t count) {
        const int64_t column = panel * width, valid = std::min(width, out_features_ - column);
        float aside[kTileRowsMax * kPanelWidthMax];
        float* out = c + row * ldc + column;
        const bool whole = valid == width, goes_on = accumulate || begin > 0;
        if (!whole && goes_on) {
            for (int64_t r = 0; r < row_count; ++r) std::copy_n(out + r * ldc, valid, aside + r * width);
        }
        multiply_tile(row_count, a + row * lda + begin, lda, b + (panel * depth + begin) * width, width, whole ? out : aside,
                      whole ? ldc : width, count, goes_on);
        if (!whole) {
            for (int64_t r = 0; r < row_count; ++r) std::copy_n(aside + r * width, valid, out + r * ldc);
        }
        if (begin + count < depth) return;
        for (int64_t r = 0; r < row_count && (bias || finish == Finish::relu); ++r) {
            for (int64_t j = 0; j < valid; ++j) {
                const float sum = out[r * ldc + j] + (bias ? bias[column + j] : 0.0f);
                out[r * ldc + j] = finish == Finish::relu ? std::max(sum, 0.0f) : sum;
            }
        }
    };
    at::parallel_for(0, row_blocks * panel_blocks, 1, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            // Neighbouring tasks share their panels, which come from memory, rather than their rows.
            const int64_t row_begin = task % row_blocks * kBlockRows, row_end = std::min(rows, row_begin + kBlockRows);
            const int64_t panel_begin = task / row_blocks * kBlockPanels,
                          panel_end = std::min(panels, panel_begin + kBlockPanels);
            for (int64_t begin = 0; begin < depth; begin += kBlockDepth) {
                for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
                    for (int64_t row = row_begin; row < row_end; row += kTileRowsMax)
                        tile(row, std::min(kTileRowsMax, row_end - row), panel, begin, std::min(kBlockDepth, depth - begin));
                }
            }
        }
    });
}

}  // namespace diffusionz
