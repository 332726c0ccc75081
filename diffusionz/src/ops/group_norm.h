// Group normalisation with an optional SiLU behind it.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// What a normalisation must know of a picture, by parts: of each part, a tile of tile_rows x tile_columns pixels (rows first,
// those at the end smaller), each channel's mean and its summed squared distances from it. The kernels of convolutions leave it.
struct ChannelMoments {
    at::Tensor values;  // float32 [batch, parts, channels, 2], undefined where nobody computed them
    int64_t rows = 0, columns = 0, tile_rows = 0, tile_columns = 0;
    int64_t layers = 1;  // pictures of rows x columns pixels whose parts follow each other
};

// GroupNorm (Wu and He 2018) of x [batch, channels, height, width], channels-last in memory and in the result; then y *
// sigmoid(y) when `silu`. `moments`: x's, where they are known.
at::Tensor group_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t groups, double eps,
                      bool silu, const ChannelMoments& moments = {});

// Whether the kernels, kernels/group_norm.cu, take x; then what they multiply each channel by and add: float32 [batch, channels,
// 2].
bool group_norm_kernel_takes(const at::Tensor& x);
at::Tensor group_norm_factors(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t groups, double eps,
                              const ChannelMoments& moments);

}  // namespace diffusionz
