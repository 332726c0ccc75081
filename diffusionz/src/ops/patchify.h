// Between latents and tokens, and the step of the sampler between two evaluations.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// latents float32 [batch, channels, rows * patch, columns * patch] to tokens [batch, rows * columns, patch * patch * channels] in
// `dtype`: a token's numbers row by row of its patch, channels innermost, as diffusers orders them.
at::Tensor patchify(const at::Tensor& latents, int64_t patch, at::ScalarType dtype);

// The other way, to float32 [batch, channels, rows * patch, columns * patch]: `tokens` [batch, rows * columns, ...].
at::Tensor unpatchify(const at::Tensor& tokens, int64_t patch, int64_t rows, int64_t columns);

// One Euler step of flow matching, in place: latents += delta * unpatchify(prediction), float32; delta float32 [1] on the device.
// The prediction with guidance is p + guidance (p - n), with p from `prediction`, n from `negative` (undefined for no guidance).
void euler_step(at::Tensor latents, const at::Tensor& prediction, const at::Tensor& negative, double guidance, int64_t patch,
                const at::Tensor& delta);

}  // namespace diffusionz
