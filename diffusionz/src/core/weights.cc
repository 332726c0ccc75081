#include "core/weights.h"

#include <ATen/Functions.h>

#include "core/error.h"

namespace diffusionz {
namespace {

at::ScalarType scalar_type(Dtype dtype) {
    switch (dtype) {
        case Dtype::float64:
            return at::kDouble;
        case Dtype::float32:
            return at::kFloat;
        case Dtype::float16:
            return at::kHalf;
        case Dtype::bfloat16:
            return at::kBFloat16;
        case Dtype::other:
            break;
    }
    return at::kByte;
}

}  // namespace

at::Tensor as_tensor(const TensorView& view, std::shared_ptr<const void> owner, const std::string& name, int32_t status) {
    if (view.dtype == Dtype::other)
        fail(status, name, ": dtype ", view.dtype_name, " is not supported; allowed are F64, F32, F16 and BF16");
    const auto options = at::TensorOptions().dtype(scalar_type(view.dtype));
    if (view.size_bytes == 0) return at::empty(view.shape, options);
    const auto tensor = at::from_blob(const_cast<uint8_t*>(view.data), view.shape, [owner = std::move(owner)](void*) {}, options);
    const bool aligned = reinterpret_cast<uintptr_t>(view.data) % tensor.element_size() == 0;
    if (aligned) return tensor;
    auto copy = at::empty(view.shape, options);
    std::memcpy(copy.data_ptr(), view.data, view.size_bytes);
    return copy;
}

at::Tensor Weights::get_on_host(const std::string& name, const std::vector<int64_t>& shape) const {
    const TensorView& view = checkpoint_->at(prefix_ + name);
    bool matches = view.shape.size() == shape.size();
    for (size_t i = 0; matches && i < shape.size(); ++i) matches = shape[i] == -1 || shape[i] == view.shape[i];
    if (!matches) {
        fail(DIFFUSIONZ_E_MODEL, checkpoint_->name(), ": tensor '", prefix_, name, "' is ", shape_text(view.shape),
             "; the model needs ", shape_text(shape), "; damaged, or a model of another architecture");
    }
    return as_tensor(view, checkpoint_, checkpoint_->name() + ": tensor '" + prefix_ + name + "'", DIFFUSIONZ_E_MODEL);
}

at::Tensor Weights::get(const std::string& name, const std::vector<int64_t>& shape) const {
    return get_on_host(name, shape).to(at::TensorOptions().device(placement_.device).dtype(placement_.dtype));
}

}  // namespace diffusionz
