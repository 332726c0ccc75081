// Numbers to FP8 (float8_e4m3fn, largest 448) with a scale a row: x is about fp8 * row_scale, row_scale = max |row| / 448.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/activation.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/types.h"
#endif

namespace diffusionz {

// x [..., width], floating point. Rows of zeros get the scale 1. The result has the forms that `form` says.
Activation quantize_rows(const at::Tensor& x, Form form = Form::fp8);

#ifdef DIFFUSIONZ_WITH_CUDA
// Memory for the forms of an activation shaped as x, and where a kernel writes them.
struct WrittenActivation {
    WrittenActivation(const at::Tensor& x, Form form);

    Activation activation;
    kernels::Written written;
};
#endif

}  // namespace diffusionz
