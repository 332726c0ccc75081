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

const char* precision_name(const Placement& placement) {
    if (placement.products == Products::fp8) return "fp8";
    if (placement.products == Products::tf32) return "tf32";
    if (placement.dtype == at::kBFloat16) return "bfloat16";
    return placement.dtype == at::kHalf ? "float16" : "float32";
}

Weights::Weights(std::shared_ptr<const Checkpoint> checkpoint, Placement placement)
    : checkpoint_(std::move(checkpoint)), placement_(placement) {
    if (placement.device.is_cuda()) upload_ = std::make_shared<Upload>(placement.device);
}

Weights Weights::below(const std::string& prefix) const {
    Weights weights = *this;
    weights.prefix_ += prefix;
    return weights;
}

const TensorView& Weights::view(const std::string& name, const std::vector<int64_t>& shape) const {
    const TensorView& view = checkpoint_->at(prefix_ + name);
    bool matches = view.shape.size() == shape.size();
    for (size_t i = 0; matches && i < shape.size(); ++i) matches = shape[i] == -1 || shape[i] == view.shape[i];
    if (!matches) {
        fail(DIFFUSIONZ_E_MODEL, checkpoint_->name(), ": tensor '", prefix_, name, "' is ", shape_text(view.shape),
             "; the model needs ", shape_text(shape), "; damaged, or a model of another architecture");
    }
    return view;
}

at::Tensor Weights::get_on_host(const std::string& name, const std::vector<int64_t>& shape) const {
    return as_tensor(view(name, shape), checkpoint_, checkpoint_->name() + ": tensor '" + prefix_ + name + "'",
                     DIFFUSIONZ_E_MODEL);
}

at::Tensor Weights::get(const std::string& name, const std::vector<int64_t>& shape) const { return get_fused({name}, {shape}); }

at::Tensor Weights::get_fused(const std::vector<std::string>& names, const std::vector<std::vector<int64_t>>& shapes) const {
    std::vector<const TensorView*> views;
    bool as_stored = upload_ != nullptr;  // of one dtype, so that the parts can stand in one tensor before they are converted
    for (size_t i = 0; i < names.size(); ++i) {
        views.push_back(&view(names[i], shapes.at(i)));
        as_stored = as_stored && views[i]->dtype == views[0]->dtype && views[i]->dtype != Dtype::other;
    }
    if (!as_stored) {
        std::vector<at::Tensor> parts;
        const auto options = at::TensorOptions().device(placement_.device).dtype(placement_.dtype);
        for (size_t i = 0; i < names.size(); ++i) parts.push_back(get_on_host(names[i], shapes[i]).to(options));
        return parts.size() == 1 ? parts[0] : at::cat(parts);
    }
    std::vector<int64_t> shape = views[0]->shape;
    for (size_t i = 1; i < views.size(); ++i) shape.at(0) += views[i]->shape.at(0);
    const at::Tensor whole = upload_->allocate(shape, scalar_type(views[0]->dtype));
    auto* to = static_cast<uint8_t*>(whole.data_ptr());
    for (const TensorView* stored : views) {
        if (stored->size_bytes == 0) continue;
        const MappedFile& file = checkpoint_->file_of(*stored);
        upload_->copy(file, static_cast<size_t>(stored->data - file.data()), stored->size_bytes, to);
        to += stored->size_bytes;
    }
    return whole.to(placement_.dtype);
}

}  // namespace diffusionz
