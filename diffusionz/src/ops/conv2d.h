// Two-dimensional convolution, channels-last.
//
// Channels-last because that is what the tensor cores and oneDNN's fastest kernels read; NCHW costs a reorder at each call.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/group_norm.h"

namespace diffusionz {

struct Conv2dInputs;

class Conv2d {
public:
    Conv2d() = default;
    // weight [out, in, k, k]; bias [out].
    Conv2d(at::Tensor weight, at::Tensor bias, int64_t stride = 1, int64_t padding = 0);

    // x [batch, in, height, width]. `residual`, if defined, of the result's shape, is added. `moments` receives the result's
    // where the kernel leaves them.
    at::Tensor operator()(const at::Tensor& x, const at::Tensor& residual = {}, ChannelMoments* moments = nullptr) const;
    // (*this)(x) + shortcut(shortcut_x), a convolution with a 1x1 kernel.
    at::Tensor with_shortcut(const at::Tensor& x, const Conv2d& shortcut, const at::Tensor& shortcut_x,
                             ChannelMoments* moments = nullptr) const;
    const at::Tensor& weight() const { return weight_; }
    const at::Tensor& bias() const { return bias_; }
    size_t nbytes() const { return weight_.defined() ? weight_.nbytes() + bias_.nbytes() : 0; }

private:
    at::Tensor by_kernel(const at::Tensor& x, Conv2dInputs added, ChannelMoments* moments) const;

    at::Tensor weight_, bias_;
    int64_t stride_ = 1, padding_ = 0;
    bool kernel_ = false;  // whether the kernel takes it
};

// Of the kernel, kernels/conv2d.cu.

// Whether it takes these weights [out, in, k, k].
bool conv2d_kernel_takes(const at::Tensor& weight);

// x [batch, in, height, width], weight, residual and shortcut_* are channels-last, the last two may be undefined; `y`
// [batch, out, height, width] is where the results go, its channels contiguous. Output pixel (i, j) reads the pixels
// (i + first_row ..., j + first_column ...) of x. `moments`: float32 [batch, tiles, out, 2] or undefined.
struct Conv2dInputs {
    at::Tensor x, weight, bias, residual;
    at::Tensor shortcut_x, shortcut_weight, shortcut_bias;
    int64_t first_row = 0, first_column = 0;
};
void conv2d_kernel(const Conv2dInputs& inputs, const at::Tensor& y, const at::Tensor& moments);
// Moments of the results of `layers` calls with x, to be written by conv2d_kernel.
ChannelMoments conv2d_moments(const at::Tensor& x, int64_t out, int64_t layers);

}  // namespace diffusionz
