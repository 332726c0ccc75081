// Between latents and tokens, and the sampler's step: on CUDA kernels/patchify.cu. Reference: the ATen operations below, which
// are also the path of the CPU (DIFFUSIONZ_DISABLE_KERNELS=patchify for all three).

#include "ops/patchify.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "ops/disabled.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/patchify.h"
#include "ops/cuda.h"
#endif

namespace diffusionz {

#ifdef DIFFUSIONZ_WITH_CUDA
namespace {

bool disabled() { return kernel_disabled("patchify"); }

bool is_tokens(const at::Tensor& x) { return x.is_cuda() && has_kernel_type(x) && x.is_contiguous(); }

kernels::Patches patches_of(const at::Tensor& latents, int64_t patch) {
    return {latents.size(0), latents.size(1), latents.size(2) / patch, latents.size(3) / patch, patch};
}

}  // namespace
#endif

at::Tensor patchify(const at::Tensor& latents, int64_t patch, at::ScalarType dtype) {
    const int64_t batch = latents.size(0), channels = latents.size(1), rows = latents.size(2) / patch,
                  columns = latents.size(3) / patch;
#ifdef DIFFUSIONZ_WITH_CUDA
    if (latents.is_cuda() && latents.scalar_type() == at::kFloat && has_kernel_type(dtype) && !disabled()) {
        const at::Tensor in = latents.contiguous();
        at::Tensor tokens = at::empty({batch, rows * columns, patch * patch * channels}, latents.options().dtype(dtype));
        if (launched("patchify", kernels::patchify(kernel_type(dtype), in.const_data_ptr<float>(), tokens.mutable_data_ptr(),
                                                   patches_of(latents, patch), current_stream(latents))))
            return tokens;
    }
#endif
    return latents.to(dtype)
        .reshape({batch, channels, rows, patch, columns, patch})
        .permute({0, 2, 4, 3, 5, 1})
        .reshape({batch, rows * columns, patch * patch * channels});
}

at::Tensor unpatchify(const at::Tensor& tokens, int64_t patch, int64_t rows, int64_t columns) {
    const int64_t batch = tokens.size(0), channels = tokens.size(2) / (patch * patch);
#ifdef DIFFUSIONZ_WITH_CUDA
    if (is_tokens(tokens) && !disabled()) {
        at::Tensor latents = at::empty({batch, channels, rows * patch, columns * patch}, tokens.options().dtype(at::kFloat));
        if (launched("unpatchify",
                     kernels::unpatchify(kernel_type(tokens.scalar_type()), tokens.const_data_ptr(),
                                         latents.mutable_data_ptr<float>(), patches_of(latents, patch), current_stream(tokens))))
            return latents;
    }
#endif
    return tokens.to(at::kFloat)
        .reshape({batch, rows, columns, patch, patch, channels})
        .permute({0, 5, 1, 3, 2, 4})
        .reshape({batch, channels, rows * patch, columns * patch});
}

void euler_step(at::Tensor latents, const at::Tensor& prediction, const at::Tensor& negative, double guidance, int64_t patch,
                const at::Tensor& delta) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (latents.scalar_type() == at::kFloat && latents.is_contiguous() && is_tokens(prediction) && !disabled() &&
        (!negative.defined() || (is_tokens(negative) && negative.scalar_type() == prediction.scalar_type())) &&
        launched("euler_step",
                 kernels::euler_step(kernel_type(prediction.scalar_type()), latents.mutable_data_ptr<float>(),
                                     prediction.const_data_ptr(), data_of(negative), static_cast<float>(guidance),
                                     delta.const_data_ptr<float>(), patches_of(latents, patch), current_stream(latents))))
        return;
#endif
    const int64_t rows = latents.size(2) / patch, columns = latents.size(3) / patch;
    at::Tensor velocity = unpatchify(prediction, patch, rows, columns);
    if (negative.defined()) velocity = velocity + (velocity - unpatchify(negative, patch, rows, columns)) * guidance;
    latents.add_(velocity * delta);
}

}  // namespace diffusionz
