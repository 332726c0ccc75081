#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

enum class FewRowsFinish { store, relu, add };

struct FewRowsLinearArguments {
    Type type;  // of the factors: float16 or bfloat16
    int32_t rows, in, out;
    // The rows: x [rows, in] in `type`; or else stream, which is normalised on the way: stream / sqrt(mean(stream^2) + epsilon) *
    // norm_weight, with the squares summed over each 64 numbers, squares [rows, in / 64], by whoever wrote it.
    const void* x;
    const float *stream, *norm_weight, *squares;
    float epsilon;
    const void* weight;  // [out, in]
    FewRowsFinish finish;
    void* y;  // store, relu: [rows, out] in `type`
    // add: sum = residual + product, float32 [rows, out], and its squares; residual may be null, and must not be `sum` where
    // `stream` is: others still read it.
    const float* residual;
    float *sum, *sum_squares;
    bool overlapped;
};

// Whether this device has a kernel for these sizes.
bool few_rows_linear_fits(int device, int64_t in, int64_t out);

cudaError_t few_rows_linear(const FewRowsLinearArguments& arguments, cudaStream_t stream);

}  // namespace diffusionz::kernels
