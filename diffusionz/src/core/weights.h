// Turns the tensors of a checkpoint into at::Tensors of one device and dtype, checking every shape.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "core/checkpoint.h"
#include "core/upload.h"

namespace diffusionz {

// How the large matrix products read their factors.
enum class Products {
    plain,  // in the placement's dtype
    tf32,   // float32 rounded to ten bits of mantissa
    fp8,    // float8_e4m3fn with a scale a row
};

// Where a model lives and in which precision it computes.
struct Placement {
    at::Device device = at::kCPU;
    at::ScalarType dtype = at::kFloat;
    Products products = Products::plain;
};

// "float32", "bfloat16", "float16", "tf32", "fp8".
const char* precision_name(const Placement& placement);

class Weights {
public:
    Weights(std::shared_ptr<const Checkpoint> checkpoint, Placement placement);

    // The tensor `name` below this prefix, of exactly `shape` (-1 matches any size). On the CPU it points into the mapped file
    // where dtype and alignment allow. Fails with E_MODEL.
    at::Tensor get(const std::string& name, const std::vector<int64_t>& shape) const;
    // Several of them, one after the other along the first dimension. On a CUDA device each goes straight to its place.
    at::Tensor get_fused(const std::vector<std::string>& names, const std::vector<std::vector<int64_t>>& shapes) const;
    bool has(const std::string& name) const { return checkpoint_->has(prefix_ + name); }
    // The stored extent in `dimension`. Fails with E_MODEL.
    int64_t extent(const std::string& name, size_t dimension) const { return checkpoint_->extent(prefix_ + name, dimension); }
    // As stored, on the host, whatever the placement.
    at::Tensor get_on_host(const std::string& name, const std::vector<int64_t>& shape) const;
    Weights below(const std::string& prefix) const;
    const Placement& placement() const { return placement_; }
    const Checkpoint& checkpoint() const { return *checkpoint_; }

private:
    // The view of a tensor that has that shape.
    const TensorView& view(const std::string& name, const std::vector<int64_t>& shape) const;

    std::shared_ptr<const Checkpoint> checkpoint_;
    Placement placement_;
    std::string prefix_;
    std::shared_ptr<Upload> upload_;  // to CUDA devices
};

// A view as a tensor that keeps `owner` alive; copied when its address is not aligned for its dtype. E_MODEL for dtypes that are
// no floating point.
at::Tensor as_tensor(const TensorView& view, std::shared_ptr<const void> owner, const std::string& name, int32_t status);

}  // namespace diffusionz
