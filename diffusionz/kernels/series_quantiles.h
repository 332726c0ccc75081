#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

struct SeriesQuantilesArguments {
    const float* z;            // [rows, patches, quantiles, patch]
    const float *loc, *scale;  // [rows]
    float* y;                  // [rows, quantiles, patches * patch]
    int64_t rows;
    int32_t patches, quantiles, patch;
    bool arcsinh;
};

cudaError_t series_quantiles(const SeriesQuantilesArguments& arguments, cudaStream_t stream);

}  // namespace diffusionz::kernels
