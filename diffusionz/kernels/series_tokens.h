#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

struct SeriesTokensArguments {
    Type type;             // of the features
    const float* context;  // [rows, context_patches * patch], its end is now; NaN is missing
    const float* future;   // [rows, future_patches * patch], NaN where not known; null: nothing is
    int32_t rows, context_patches, future_patches, patch;
    bool register_token, arcsinh;
    float time_encoding_scale;
    void* features;      // [rows, tokens, width], tokens = context_patches + register_token + future_patches
    int32_t width;       // at least as the layout needs (series_tokens.cu)
    uint8_t* valid;      // [rows, tokens]: whether a context patch has an observation; all others are valid
    float *loc, *scale;  // [rows]
};

cudaError_t series_tokens(const SeriesTokensArguments& arguments, cudaStream_t stream);

}  // namespace diffusionz::kernels
