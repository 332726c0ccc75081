#include "ops/linear.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/gemm_sm90.h"
#endif
#include "ops/cuda.h"
#include "ops/disabled.h"
#include "ops/quantize_rows.h"

namespace diffusionz {
namespace {

// oneDNN's operators have no C++ header in LibTorch; the dispatcher knows them by name, where LibTorch was built with them.
std::optional<c10::OperatorHandle> find_operator(const char* name) { return c10::Dispatcher::singleton().findSchema({name, ""}); }

at::Tensor call(const c10::OperatorHandle& op, std::initializer_list<c10::IValue> arguments) {
    torch::jit::Stack stack(arguments);
    op.callBoxed(stack);
    return stack.at(0).toTensor();
}

std::optional<at::Tensor> optional(const at::Tensor& x) { return x.defined() ? std::optional<at::Tensor>(x) : std::nullopt; }

// The numbers of a quantized tensor, rounded to dtype.
at::Tensor dequantize(const at::Tensor& fp8, const at::Tensor& row_scales, at::ScalarType dtype) {
    return fp8.to(at::kFloat).mul_(row_scales).to(dtype);
}

}  // namespace

Linear::Linear(at::Tensor weight, at::Tensor bias, Products products)
    : weight_(std::move(weight)),
      bias_(std::move(bias)),
      dtype_(weight_.scalar_type()),
      in_features_(weight_.size(1)),
      out_features_(weight_.size(0)) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (weight_.is_cuda()) {
        compute_capability_ = compute_capability(weight_);
        multiprocessors_ = device_attribute(weight_, cudaDevAttrMultiProcessorCount);
    }
#endif
    if (products == Products::fp8) {
        const Activation quantized = quantize_rows(weight_);
        weight_ = quantized.fp8;
        row_scales_ = quantized.row_scales;
        return;
    }
    static const auto reorder = find_operator("mkldnn::_reorder_linear_weight");
    if (!reorder || !weight_.device().is_cpu() || weight_.scalar_type() != at::kFloat || kernel_disabled("linear")) return;
    weight_ = call(*reorder, {weight_.contiguous(), c10::IValue()});
    reordered_ = true;
}

at::Tensor Linear::product(const at::Tensor& x) const {
    if (!reordered_) return at::linear(x, weight_, optional(bias_));
    static const auto product = find_operator("mkldnn::_linear_pointwise");
    return call(*product, {x.contiguous(), weight_, bias_.defined() ? c10::IValue(bias_) : c10::IValue(), "none",
                           c10::impl::toList(c10::List<std::optional<at::Scalar>>()), ""});
}

Activation Linear::readable(const Activation& x) const {
    if (!quantized() || x.fp8.defined()) return x;
    Activation both = quantize_rows(x.plain);
    both.plain = x.plain;
    return both;
}

at::Tensor Linear::own_product(const Activation& x, bool gated) const {
#ifdef DIFFUSIONZ_WITH_CUDA
    const bool disabled = kernel_disabled("gemm");
    if (disabled || compute_capability_ != 90 || dtype_ != at::kBFloat16 || bias_.defined()) return {};
    const at::Tensor factor = (quantized() ? x.fp8 : x.plain).contiguous(), weight = weight_.contiguous();
    kernels::Gemm gemm;
    gemm.x = factor.const_data_ptr();
    gemm.weight = weight.const_data_ptr();
    gemm.rows = factor.numel() / in_features_;
    gemm.columns = out_features_;
    gemm.depth = in_features_;
    gemm.gated = gated;
    at::Tensor scales;
    if (quantized()) {
        scales = x.row_scales.contiguous();
        gemm.x_scales = scales.const_data_ptr<float>();
        gemm.weight_scales = row_scales_.const_data_ptr<float>();
    }
    const int tile = kernels::gemm_sm90_tile(gemm, multiprocessors_);
    const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    if (tile < 0 || factor.scalar_type() != weight_.scalar_type() || !aligned(gemm.x) || !aligned(gemm.weight)) return {};
    auto shape = factor.sizes().vec();
    shape.back() = gated ? out_features_ / 2 : out_features_;
    at::Tensor y = at::empty(shape, factor.options().dtype(dtype_));
    gemm.y = y.mutable_data_ptr();
    check_launch("gemm", kernels::gemm_sm90(gemm, tile, multiprocessors_, current_stream(y)));
    return y;
#else
    (void)x, (void)gated;
    return {};
#endif
}

at::Tensor Linear::fp8_product(const Activation& x) const {
    if (compute_capability_ < 89 || in_features_ % 16 != 0 || out_features_ % 16 != 0) {
        return at::linear(dequantize(x.fp8, x.row_scales, dtype_), dequantize(weight_, row_scales_, dtype_), optional(bias_));
    }
    auto shape = x.fp8.sizes().vec();
    shape.back() = out_features_;
    // Fast accumulation keeps fewer bits of the sum than float32 has, far more than FP8's numbers have.
    return at::_scaled_mm(x.fp8.reshape({-1, in_features_}), weight_.t(), x.row_scales.reshape({-1, 1}), row_scales_.t(),
                          optional(bias_), std::nullopt, dtype_, /*use_fast_accum=*/true)
        .view(shape);
}

at::Tensor Linear::operator()(const Activation& given, const LoraPairs* lora) const {
    const Activation x = readable(given);
    at::Tensor y = own_product(x, false);
    if (!y.defined()) y = quantized() ? fp8_product(x) : product(x.plain);
    if (!lora) return y;
    const auto found = lora->find(this);
    if (found == lora->end()) return y;
    const at::Tensor numbers = x.plain.defined() ? x.plain : dequantize(x.fp8, x.row_scales, dtype_);
    for (const LoraPair& pair : found->second) {
        at::Tensor corrected = y.flatten(0, -2).narrow(-1, pair.row_begin, pair.up.size(0));
        corrected.addmm_(at::linear(numbers.flatten(0, -2), pair.down), pair.up.t(), /*beta=*/1, pair.scale);
    }
    return y;
}

size_t Linear::nbytes() const {
    if (!weight_.defined()) return 0;
    return static_cast<size_t>(in_features_ * out_features_) * weight_.element_size() +
           (row_scales_.defined() ? row_scales_.nbytes() : 0) + (bias_.defined() ? bias_.nbytes() : 0);
}

}  // namespace diffusionz
