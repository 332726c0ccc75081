// Launch of quantize_rows.cu.
#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// x [rows, width], contiguous, to float8_e4m3fn with a scale a row. cudaErrorNotSupported where a row is too wide (8192 is not;
// 16384 numbers of 16 bits where vectors of 16 bytes tile them).
cudaError_t quantize_rows(Type type, const void* x, uint8_t* fp8, float* row_scales, int64_t rows, int64_t width,
                          cudaStream_t stream);

}  // namespace diffusionz::kernels
