#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

struct ResidualNormArguments {
    Type type;               // of delta and y
    float* x;                // [.., width]
    const void* delta;       // [rows, width], or null
    const float* weight;     // [width]
    void* y;                 // [rows, width]
    int64_t rows, x_stride;  // numbers from a row of x to the next
    int32_t width;
    float epsilon;
    bool overlapped;
};

cudaError_t residual_norm(const ResidualNormArguments& arguments, cudaStream_t stream);

}  // namespace diffusionz::kernels
