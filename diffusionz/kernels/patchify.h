// Launches of patchify.cu.
#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// Latents float32 [batch, channels, rows * patch, columns * patch] and their tokens [batch, rows * columns, patch, patch,
// channels].
struct Patches {
    int64_t batch, channels, rows, columns, patch;
};

cudaError_t patchify(Type type, const float* latents, void* tokens, Patches shape, cudaStream_t stream);
cudaError_t unpatchify(Type type, const void* tokens, float* latents, Patches shape, cudaStream_t stream);
// latents += *delta * v, v the unpatchified p + guidance (p - n), or p where `negative` is null.
cudaError_t euler_step(Type type, float* latents, const void* prediction, const void* negative, float guidance,
                       const float* delta, Patches shape, cudaStream_t stream);

}  // namespace diffusionz::kernels
