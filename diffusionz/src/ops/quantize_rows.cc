// Numbers to FP8 with a scale a row. Reference: quantize_reference, which is also the path of the CPU.

#include "ops/quantize_rows.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace diffusionz {
namespace {

constexpr double kLargest = 448.0;    // of float8_e4m3fn
constexpr double kSmallestMax = 1e-30;  // below it the reciprocal of a scale would overflow

Activation quantize_reference(const at::Tensor& x) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor largest = wide.abs().amax(-1, /*keepdim=*/true);
    Activation result;
    result.row_scales = at::where(largest == 0, at::ones_like(largest), largest.clamp_min(kSmallestMax) / kLargest);
    result.fp8 = (wide / result.row_scales).clamp_(-kLargest, kLargest).to(at::kFloat8_e4m3fn);
    return result;
}

}  // namespace

Activation quantize_rows(const at::Tensor& x, Form form) {
    if (form == Form::plain) return x;
    Activation result = quantize_reference(x);
    if (form == Form::both) result.plain = x;
    return result;
}

}  // namespace diffusionz
