// A head's output as quantiles of the series.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// z float32 [rows, patches, quantiles, patch], without gaps, loc and scale [rows]: sinh(z) * scale + loc (without the sinh unless
// `arcsinh`) as [rows, quantiles, patches * patch]. Reference: ATen, the path of the CPU
// (DIFFUSIONZ_DISABLE_KERNELS=series_quantiles).
at::Tensor series_quantiles(const at::Tensor& z, const at::Tensor& loc, const at::Tensor& scale, bool arcsinh);

}  // namespace diffusionz
