// y = a / (1 + e^-a) * b, with a and b the halves of a row: what the fused product of w1 and w3 gives.
//
// Why our own on the CPU: one pass instead of two, and libm's exponential is most of ATen's. On CUDA kernels/silu_gate.cu.
// Reference: at::silu and a product, which is also the path of the CPU in other precisions
// (DIFFUSIONZ_DISABLE_KERNELS=silu_gate).

#include "ops/silu_gate.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include "ops/disabled.h"
#include "ops/quantize_rows.h"
#include "ops/vector_math.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/silu_gate.h"
#include "ops/cuda.h"
#endif

namespace diffusionz {
namespace {

constexpr int64_t kGrainElements = 8192;  // a quarter of ATen's: each costs an exponential

DIFFUSIONZ_VECTORIZED void gate_rows(const float* x, float* y, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* a = x + row * 2 * width;
        const float* b = a + width;
        for (int64_t i = 0; i < width; ++i) y[row * width + i] = a[i] / (1.0f + exp_approx(-a[i])) * b[i];
    }
}

at::Tensor gate_plain(const at::Tensor& x, bool disabled) {
    const auto halves = x.chunk(2, -1);
    if (!x.is_cpu() || x.scalar_type() != at::kFloat || !x.is_contiguous() || disabled)
        return at::silu(halves[0]).mul_(halves[1]);
    at::Tensor y = at::empty(halves[0].sizes(), x.options());
    const int64_t width = y.size(-1), rows = y.numel() / width;
    const float* in = x.const_data_ptr<float>();
    float* out = y.mutable_data_ptr<float>();
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrainElements / width), [&](int64_t begin, int64_t end) {
        gate_rows(in + begin * 2 * width, out + begin * width, end - begin, width);
    });
    return y;
}

}  // namespace

Activation silu_gate(const at::Tensor& x, Form form) {
    const bool disabled = kernel_disabled("silu_gate");
#ifdef DIFFUSIONZ_WITH_CUDA
    if (x.is_cuda() && has_kernel_type(x) && x.is_contiguous() && !disabled) {
        const int64_t width = x.size(-1) / 2, rows = width ? x.numel() / (2 * width) : 0;
        const WrittenActivation y(x.narrow(-1, 0, width), form);
        if (launched("silu_gate", kernels::silu_gate(kernel_type(x.scalar_type()), x.const_data_ptr(), y.written, rows, width,
                                                     current_stream(x))))
            return y.activation;
    }
#endif
    return quantize_rows(gate_plain(x, disabled), form);
}

at::Tensor silu_gate(const at::Tensor& x) { return silu_gate(x, Form::plain).plain; }

}  // namespace diffusionz
