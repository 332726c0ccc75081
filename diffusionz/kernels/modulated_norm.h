// Launches of modulated_norm.cu.
#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// All: rows (outer, inner) of `width` numbers of `type`; cudaErrorNotSupported where a row is too wide (8192 is not).

// y = rms_norm(x, weight, eps) * scale.
cudaError_t modulated_norm(Type type, Rows x, const void* weight, Factors scale, Written y, int64_t outer, int64_t inner,
                           int64_t width, float eps, cudaStream_t stream);

// sum = x + gate * rms_norm(y, weight, eps), without a weight x + gate * y; normed = rms_norm(sum, next_weight, eps) *
// next_scale, nothing without a next_weight. `sum` is contiguous.
cudaError_t gated_residual(Type type, Rows x, Rows y, const void* weight, Factors gate, void* sum, const void* next_weight,
                           Factors next_scale, Written normed, int64_t outer, int64_t inner, int64_t width, float eps,
                           cudaStream_t stream);

// y = layer_norm(x, eps) * scale, contiguous.
cudaError_t modulated_layer_norm(Type type, Rows x, Factors scale, void* y, int64_t outer, int64_t inner, int64_t width,
                                 float eps, cudaStream_t stream);

}  // namespace diffusionz::kernels
