// y = x W^T + b, the product of every layer, with the corrections of LoRA adapters added at run time.
//
// On the CPU in float32 the weight is reordered once into oneDNN's blocked layout: at::linear reorders it at every call.
// The reordered copy replaces the mapped file's pages in memory (which several processes could share) by private ones of the same
// size. Reference: at::linear (set DIFFUSIONZ_DISABLE_KERNELS=linear).
#pragma once

#include <ATen/core/Tensor.h>

#include <unordered_map>
#include <vector>

namespace diffusionz {

class Linear;

// One LoRA correction: y[..., row_begin : row_begin + rows] += scale * (x down^T) up^T.
struct LoraPair {
    at::Tensor down;  // [rank, in]
    at::Tensor up;    // [rows, rank]
    int64_t row_begin = 0;
    double scale = 1.0;
};
using LoraPairs = std::unordered_map<const Linear*, std::vector<LoraPair>>;

class Linear {
public:
    Linear() = default;
    // weight [out, in]; bias [out] or undefined.
    Linear(at::Tensor weight, at::Tensor bias = {});
    Linear(const Linear&) = delete;  // LoraPairs refer to layers by address
    Linear& operator=(Linear&&) = default;
    Linear(Linear&&) = default;

    // x [..., in] to [..., out]. `lora` may be null.
    at::Tensor operator()(const at::Tensor& x, const LoraPairs* lora = nullptr) const;

    int64_t in_features() const { return in_features_; }
    int64_t out_features() const { return out_features_; }
    size_t nbytes() const;

private:
    at::Tensor weight_;  // as given, or reordered
    at::Tensor bias_;
    bool reordered_ = false;
    int64_t in_features_ = 0;
    int64_t out_features_ = 0;
};

}  // namespace diffusionz
