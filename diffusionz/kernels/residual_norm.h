#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

struct ResidualNormArguments {
    Type type;               // of a, b and y
    float* x;                // [rows, width]
    const void *a, *b;       // [rows, width] or null: what is added to x first
    bool keep;               // writes the sum to x
    void* y;                 // [rows, width]
    int64_t rows, x_stride;  // numbers from a row of x to the next
    int32_t width;
    float epsilon;
};

cudaError_t residual_norm(const ResidualNormArguments& arguments, cudaStream_t stream);

}  // namespace diffusionz::kernels
