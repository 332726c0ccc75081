// Launches of group_norm.cu.
#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// Moments: float [batch, parts, channels, 2], of each part of a picture each channel's mean and its summed squared distances from
// it. Parts are tiles of tile_rows x tile_columns pixels, rows first, those at the end smaller; `layers` such sets lie behind
// each other.
struct Parts {
    int64_t rows, columns, tile_rows, tile_columns, layers;

    int64_t tiles_across() const { return (columns + tile_columns - 1) / tile_columns; }
    int64_t tiles() const { return (rows + tile_rows - 1) / tile_rows * tiles_across(); }
    int64_t count() const { return layers * tiles(); }
};

// How group_norm_moments cuts a picture of `pixels` pixels.
Parts group_norm_parts(int64_t pixels, int64_t channels);
// x [batch, pixels, channels].
cudaError_t group_norm_moments(Type type, const void* x, float* moments, int64_t batch, int64_t pixels, int64_t channels,
                               cudaStream_t stream);
// factors: float [batch, channels, 2], what group_norm_apply multiplies a channel by and adds.
cudaError_t group_norm_factors(Type type, const float* moments, const void* weight, const void* bias, float* factors, const Parts& parts,
                               int64_t batch, int64_t channels, int64_t groups, double eps, cudaStream_t stream);
// y = x * factors[0] + factors[1], then y * sigmoid(y) when `silu`. y may be x.
cudaError_t group_norm_apply(Type type, const void* x, const float* factors, void* y, int64_t batch, int64_t pixels, int64_t channels,
                             bool silu, cudaStream_t stream);

}  // namespace diffusionz::kernels
