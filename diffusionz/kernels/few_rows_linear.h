// Products of few rows between a float32 residual stream and itself: see few_rows_linear.cu.
#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// Sums of squares of a stream's rows, in parts: a row's is the sum of the first `parts` numbers in its row of data
// [rows, kRowSquaresPitch]. Null: there is none.
constexpr int32_t kRowSquaresPitch = 16;
struct RowSquares {
    const float* data = nullptr;
    int32_t parts = 0;
};

// y = f x W^T, where f is a factor a row. With `sum` the product is added to it, and y is what the next products read of the sum:
// the sum times a power of two a row, which keeps it within 16 bits. Other pointers are as wide as their names say.
struct FewRowsLinear {
    Type type;           // of x, weight and y: float16 or bfloat16
    const void* x;       // [rows, depth]
    const void* weight;  // [columns, depth]
    int64_t rows, columns, depth;
    // Of a stream [rows, width]: of the stream as it is, and of the stream from which the powers of two in x follow. With both, x
    // is the stream times its powers, and f the norm's factor over them; without the latter f is 1. With `sum` the powers of two
    // in y follow from `squares`, which is then of the sum before.
    RowSquares squares, scale_squares;
    float inverse_width, epsilon;
    bool relu;           // max(y, 0); not with `sum`
    float* sum;          // [rows, columns], or null
    float* sum_squares;  // [rows, kRowSquaresPitch]: columns / kFewRowsColumns parts of the new sum's
    void* y;             // [rows, columns], not x
};
constexpr int64_t kFewRowsColumns = 64;  // of a block; streams have at most kRowSquaresPitch times that

// In how many parts a cluster shares `depth`; 0 where such a product is not taken: sizes, or another device than Hopper's.
int few_rows_linear_parts(int64_t columns, int64_t depth, int compute_capability);

// cudaErrorNotSupported where the driver cannot describe the matrices. Pointers are multiples of 16 bytes.
cudaError_t few_rows_linear(const FewRowsLinear& call, int parts, cudaStream_t stream);

// Of a stream that something else wrote: squares, in one part, and y [rows, width], the stream times its powers of two.
struct ScaledRows {
    Type type;  // of y
    const float* x;
    int64_t rows, width;
    float epsilon;
    float* squares;  // [rows, kRowSquaresPitch]
    void* y;
};
cudaError_t scale_rows(const ScaledRows& call, cudaStream_t stream);

}  // namespace diffusionz::kernels
