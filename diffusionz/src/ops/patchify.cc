// Between latents and tokens, and the sampler's step. Reference: the ATen operations below, which are also the path of the CPU.

#include "ops/patchify.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace diffusionz {

at::Tensor patchify(const at::Tensor& latents, int64_t patch, at::ScalarType dtype) {
    const int64_t batch = latents.size(0), channels = latents.size(1), rows = latents.size(2) / patch,
                  columns = latents.size(3) / patch;
    return latents.to(dtype)
        .reshape({batch, channels, rows, patch, columns, patch})
        .permute({0, 2, 4, 3, 5, 1})
        .reshape({batch, rows * columns, patch * patch * channels});
}

at::Tensor unpatchify(const at::Tensor& tokens, int64_t patch, int64_t rows, int64_t columns) {
    const int64_t batch = tokens.size(0), channels = tokens.size(2) / (patch * patch);
    return tokens.to(at::kFloat)
        .reshape({batch, rows, columns, patch, patch, channels})
        .permute({0, 5, 1, 3, 2, 4})
        .reshape({batch, channels, rows * patch, columns * patch});
}

void euler_step(at::Tensor latents, const at::Tensor& prediction, const at::Tensor& negative, double guidance, int64_t patch,
                const at::Tensor& delta) {
    const int64_t rows = latents.size(2) / patch, columns = latents.size(3) / patch;
    at::Tensor velocity = unpatchify(prediction, patch, rows, columns);
    if (negative.defined()) velocity = velocity + (velocity - unpatchify(negative, patch, rows, columns)) * guidance;
    latents.add_(velocity * delta);
}

}  // namespace diffusionz
