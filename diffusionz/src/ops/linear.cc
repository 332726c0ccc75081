#include "ops/linear.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>

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

// Of x's device, as 10 major + minor; 0 of the CPU.
int compute_capability(const at::Tensor& x) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (x.is_cuda()) {
        int major = 0, minor = 0;
        check_launch("linear", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.device().index()));
        check_launch("linear", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, x.device().index()));
        return 10 * major + minor;
    }
#endif
    (void)x;
    return 0;
}

}  // namespace

Linear::Linear(at::Tensor weight, at::Tensor bias, Products products)
    : weight_(std::move(weight)),
      bias_(std::move(bias)),
      dtype_(weight_.scalar_type()),
      compute_capability_(compute_capability(weight_)),
      in_features_(weight_.size(1)),
      out_features_(weight_.size(0)) {
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

at::Tensor Linear::fp8_product(const Activation& given) const {
    const Activation x = given.fp8.defined() ? given : quantize_rows(given.plain);
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

at::Tensor Linear::operator()(const Activation& x, const LoraPairs* lora) const {
    at::Tensor y = quantized() ? fp8_product(x) : product(x.plain);
    if (!lora) return y;
    const auto found = lora->find(this);
    if (found == lora->end()) return y;
    const at::Tensor numbers = x.plain.defined() ? x.plain : dequantize(x.fp8, x.row_scales, dtype_);
    for (const LoraPair& pair : found->second) {
        y.narrow(-1, pair.row_begin, pair.up.size(0)).add_(at::linear(at::linear(numbers, pair.down), pair.up), pair.scale);
    }
    return y;
}

size_t Linear::nbytes() const {
    if (!weight_.defined()) return 0;
    return static_cast<size_t>(in_features_ * out_features_) * weight_.element_size() +
           (row_scales_.defined() ? row_scales_.nbytes() : 0) + (bias_.defined() ? bias_.nbytes() : 0);
}

}  // namespace diffusionz
