// Launches of silu_gate.cu.
#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// x [rows, 2 width], contiguous, to y [rows, width] in the forms asked for. cudaErrorNotSupported where the FP8 form is asked for
// and a row is too wide (8192 is not; 16384 numbers of 16 bits where vectors of 16 bytes tile them).
cudaError_t silu_gate(Type type, const void* x, Written y, int64_t rows, int64_t width, cudaStream_t stream);

}  // namespace diffusionz::kernels
