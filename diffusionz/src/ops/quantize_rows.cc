// Numbers to FP8 with a scale a row: on CUDA kernels/quantize_rows.cu. Reference: quantize_reference, which is also the path of
// the CPU (DIFFUSIONZ_DISABLE_KERNELS=quantize_rows).

#include "ops/quantize_rows.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "ops/disabled.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/quantize_rows.h"
#include "ops/cuda.h"
#endif

namespace diffusionz {
namespace {

constexpr double kLargest = 448.0;      // of float8_e4m3fn
constexpr double kSmallestMax = 1e-30;  // below it the reciprocal of a scale would overflow

Activation quantize_reference(const at::Tensor& x) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor largest = wide.abs().amax(-1, /*keepdim=*/true);
    Activation result;
    result.row_scales = at::where(largest == 0, at::ones_like(largest), largest.clamp_min(kSmallestMax) / kLargest);
    result.fp8 = (wide / result.row_scales).clamp_(-kLargest, kLargest).to(at::kFloat8_e4m3fn);
    return result;
}

Activation quantize(const at::Tensor& x) {
#ifdef DIFFUSIONZ_WITH_CUDA
    const bool disabled = kernel_disabled("quantize_rows");
    if (x.is_cuda() && has_kernel_type(x) && !disabled) {
        const at::Tensor rows = x.contiguous();
        WrittenActivation y(rows, Form::fp8);
        const int64_t width = x.size(-1);
        if (launched("quantize_rows",
                     kernels::quantize_rows(kernel_type(x.scalar_type()), rows.const_data_ptr(), y.written.fp8,
                                            y.written.row_scales, width ? x.numel() / width : 0, width, current_stream(x))))
            return y.activation;
    }
#endif
    return quantize_reference(x);
}

}  // namespace

#ifdef DIFFUSIONZ_WITH_CUDA
WrittenActivation::WrittenActivation(const at::Tensor& x, Form form) {
    if (form != Form::fp8) {
        activation.plain = at::empty(x.sizes(), x.options());
        written.plain = activation.plain.mutable_data_ptr();
    }
    if (form == Form::plain) return;
    activation.fp8 = at::empty(x.sizes(), x.options().dtype(at::kFloat8_e4m3fn));
    auto one_a_row = x.sizes().vec();
    one_a_row.back() = 1;
    activation.row_scales = at::empty(one_a_row, x.options().dtype(at::kFloat));
    written.fp8 = static_cast<uint8_t*>(activation.fp8.mutable_data_ptr());
    written.row_scales = activation.row_scales.mutable_data_ptr<float>();
}
#endif

Activation quantize_rows(const at::Tensor& x, Form form) {
    if (form == Form::plain) return x;
    Activation result = quantize(x);
    if (form == Form::both) result.plain = x;
    return result;
}

}  // namespace diffusionz
