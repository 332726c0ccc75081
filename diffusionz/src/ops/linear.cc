#include "ops/linear.h"

#include <ATen/Functions.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "ops/disabled.h"

namespace diffusionz {
namespace {

// oneDNN's operators have no C++ header in LibTorch; the dispatcher knows them by name, where LibTorch was built with them.
std::optional<c10::OperatorHandle> find_operator(const char* name) { return c10::Dispatcher::singleton().findSchema({name, ""}); }

at::Tensor call(const c10::OperatorHandle& op, std::initializer_list<c10::IValue> arguments) {
    torch::jit::Stack stack(arguments);
    op.callBoxed(stack);
    return stack.at(0).toTensor();
}

}  // namespace

Linear::Linear(at::Tensor weight, at::Tensor bias)
    : weight_(std::move(weight)), bias_(std::move(bias)), in_features_(weight_.size(1)), out_features_(weight_.size(0)) {
    static const auto reorder = find_operator("mkldnn::_reorder_linear_weight");
    if (!reorder || !weight_.device().is_cpu() || weight_.scalar_type() != at::kFloat || kernel_disabled("linear")) return;
    weight_ = call(*reorder, {weight_.contiguous(), c10::IValue()});
    reordered_ = true;
}

at::Tensor Linear::operator()(const at::Tensor& x, const LoraPairs* lora) const {
    at::Tensor y;
    if (reordered_) {
        static const auto product = find_operator("mkldnn::_linear_pointwise");
        y = call(*product, {x.contiguous(), weight_, bias_.defined() ? c10::IValue(bias_) : c10::IValue(), "none",
                            c10::impl::toList(c10::List<std::optional<at::Scalar>>()), ""});
    } else {
        y = at::linear(x, weight_, bias_.defined() ? std::optional<at::Tensor>(bias_) : std::nullopt);
    }
    if (!lora) return y;
    const auto found = lora->find(this);
    if (found == lora->end()) return y;
    for (const LoraPair& pair : found->second) {
        y.narrow(-1, pair.row_begin, pair.up.size(0)).add_(at::linear(at::linear(x, pair.down), pair.up), pair.scale);
    }
    return y;
}

size_t Linear::nbytes() const {
    if (!weight_.defined()) return 0;
    return static_cast<size_t>(in_features_ * out_features_) * weight_.element_size() + (bias_.defined() ? bias_.nbytes() : 0);
}

}  // namespace diffusionz
