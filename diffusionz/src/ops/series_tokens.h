// Rows of a time series as the features of their patches, and the weights that read them.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

struct SeriesPatches {
    int64_t patch;  // steps
    bool register_token, arcsinh;
    double time_encoding_scale;
};

struct SeriesTokens {
    at::Tensor features;    // [rows * tokens, width]: laid out as kernels/series_tokens.cu says
    at::Tensor valid;       // uint8 [rows, tokens]: whether a patch of the context has an observation; all others are valid
    at::Tensor loc, scale;  // float32 [rows]
};

// context float32 [rows, context patches * patch], future float32 [rows, future patches * patch], both without gaps, NaN where
// nothing is known. A row's tokens: its context's patches, the register token, its future's patches. `dtype` is the features'.
// Reference: ATen, the path of the CPU (DIFFUSIONZ_DISABLE_KERNELS=series_tokens).
SeriesTokens series_tokens(const SeriesPatches& patches, const at::Tensor& context, const at::Tensor& future,
                           at::ScalarType dtype);

// weight [out, 3 * patch], bias [out] and register_embedding [out] (undefined for none), all float32, as one weight [out, width]
// in `dtype` for those features.
at::Tensor series_weight(const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& register_embedding,
                         at::ScalarType dtype);

}  // namespace diffusionz
