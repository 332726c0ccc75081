// Launches of conv2d.cu.
#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// A square kernel of `taps` x `taps` over x [batch, height, width, in] (channels-last, contiguous), weights [out, taps, taps, in].
// Output pixel (i, j) reads the pixels (i + first_row ..., j + first_column ...), zeros outside, and is written at
// y + i * row_stride + j * pixel_stride + batch * image_stride (numbers).
struct Conv2dCall {
    const void *x, *weight, *bias;
    // May be null; what is added: a picture that lies as y does.
    const void* residual;
    // May be null; what is added: each pixel of a second picture [batch, height, width, shortcut_in] times weights
    // [out, shortcut_in], and their bias.
    const void *shortcut_x, *shortcut_weight, *shortcut_bias;
    void* y;
    // May be null; float [batch, tiles, out, 2]: of each tile of 16x16 output pixels (rows first) each channel's mean and summed
    // squared distances from it, of the unrounded results. Image b's begin at moments + b * moments_stride (numbers).
    float* moments;
    int64_t batch, height, width, in, shortcut_in, out;
    int64_t taps, first_row, first_column;
    int64_t image_stride, row_stride, pixel_stride, moments_stride;
};

constexpr int64_t kConv2dTile = 16;

// bfloat16, compute capability 9.0.
bool conv2d_sm90_takes(int device, int64_t in, int64_t out, int64_t taps);
cudaError_t conv2d_sm90(const Conv2dCall& call, cudaStream_t stream);

}  // namespace diffusionz::kernels
