#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

struct ResidualNormArguments {
    Type type;               // of y
    const float* x;          // [rows, width]
    void* y;                 // [rows, width]
    int64_t rows, x_stride;  // numbers from a row of x to the next
    int32_t width;
    float epsilon;
};

cudaError_t residual_norm(const ResidualNormArguments& arguments, cudaStream_t stream);

}  // namespace diffusionz::kernels
