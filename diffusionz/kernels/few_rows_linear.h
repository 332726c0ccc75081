#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// What a norm of rows needs: the sums of their squares over each 16 numbers.
constexpr int kSquaresOf = 16;

enum class FewRowsFinish { store, relu, add };

struct FewRowsLinearArguments {
    Type type;  // of x, weight and y: float16 or bfloat16
    int32_t rows, in, out;
    const void* x;       // [rows, in]
    const void* weight;  // [out, in]
    float epsilon;
    // Null, or x is a multiple of a residual stream that is to be normalised: row i of the product is multiplied by
    // norm(squares) / norm(x_squares), where norm(s) = 1 / sqrt(mean + epsilon) of a row, both [rows, in / 16]; x_squares null
    // for 1.
    const float *squares, *x_squares;
    FewRowsFinish finish;
    // store, relu: [rows, out]. add: the stream after the sum times norm(residual_squares), or 1 for null: what the next product
    // reads.
    void* y;
    const float *residual, *residual_squares;  // [rows, out] and [rows, out / 16], or null for 0
    float *sum, *sum_squares;                  // add: residual + product, and its squares. `sum` may be `residual`.
    bool overlapped;
};

// Whether this device has a kernel for these sizes.
bool few_rows_linear_fits(int device, int64_t in, int64_t out);

cudaError_t few_rows_linear(const FewRowsLinearArguments& arguments, cudaStream_t stream);

}  // namespace diffusionz::kernels
