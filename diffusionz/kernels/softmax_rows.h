// Launches of softmax_rows.cu.
#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// y [rows, width] of `type` = softmax(scale * x) along rows, x float32 [rows, width], scale > 0.
cudaError_t softmax_rows(Type type, const float* x, void* y, int64_t rows, int64_t width, float scale, cudaStream_t stream);

}  // namespace diffusionz::kernels
