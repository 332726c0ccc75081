// y = x W^T + b, the product of every layer, with the corrections of LoRA adapters added at run time.
//
// On the CPU in float32 the weight is reordered once into oneDNN's blocked layout: at::linear reorders it at every call.
// The reordered copy replaces the mapped file's pages in memory (which several processes could share) by private ones of the same
// size. Reference: at::linear (set DIFFUSIONZ_DISABLE_KERNELS=linear).
//
// With Products::fp8 both factors are float8_e4m3fn with a float32 scale a row: the weight is quantized here, once, the input by
// whoever made it or else at every call. Sums are in float32, the result in the weight's dtype; bias and adapters stay in it,
// too. Where the device has no FP8 products (the CPU, and GPUs before compute capability 8.9) and at sizes that are no multiples
// of 16 the same numbers are multiplied in the weight's dtype.
//
// On Hopper, in bfloat16 and FP8, the sizes where kernels/gemm_sm90.cu is faster than the library go there
// (DIFFUSIONZ_DISABLE_KERNELS=gemm sends them back).
#pragma once

#include <ATen/core/Tensor.h>

#include <unordered_map>
#include <vector>

#include "core/weights.h"
#include "ops/activation.h"

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
    // weight [out, in], on its device and in the dtype of the results; bias [out] or undefined. Products::tf32 is for the caller
    // to switch on: here it is `plain`.
    Linear(at::Tensor weight, at::Tensor bias = {}, Products products = Products::plain);
    Linear(const Linear&) = delete;  // LoraPairs refer to layers by address
    Linear& operator=(Linear&&) = default;
    Linear(Linear&&) = default;

    // x [..., in] to [..., out]. `lora` may be null. With FP8 products x.fp8 is read where it is defined, and x.plain then only
    // by adapters; without them x.plain is.
    at::Tensor operator()(const Activation& x, const LoraPairs* lora = nullptr) const;

    int64_t in_features() const { return in_features_; }
    int64_t out_features() const { return out_features_; }
    // Whether the factors are FP8.
    bool quantized() const { return row_scales_.defined(); }
    size_t nbytes() const;

private:
    friend Activation gated_linear(const Linear&, const Activation&, const LoraPairs*, Form);
    // x with the factor that the product reads.
    Activation readable(const Activation& x) const;
    // The product by our own kernel, gated where asked for; undefined where that is not for this device, dtype or size.
    at::Tensor own_product(const Activation& x, bool gated) const;
    at::Tensor product(const at::Tensor& x) const;
    at::Tensor fp8_product(const Activation& x) const;

    at::Tensor weight_;      // as given, reordered, or as FP8
    at::Tensor row_scales_;  // float32 [out, 1], of an FP8 weight
    at::Tensor bias_;
    at::ScalarType dtype_ = at::kFloat;  // of the results
    int compute_capability_ = 0;         // of the weight's device, as 10 major + minor; 0 of the CPU
    int multiprocessors_ = 0;
    bool reordered_ = false;
    int64_t in_features_ = 0;
    int64_t out_features_ = 0;
};

}  // namespace diffusionz
