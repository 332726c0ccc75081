// Two-dimensional convolution, channels-last.
//
// Channels-last because that is what the tensor cores and oneDNN's fastest kernels read; NCHW costs a reorder at each call.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

class Conv2d {
public:
    Conv2d() = default;
    // weight [out, in, k, k]; bias [out].
    Conv2d(at::Tensor weight, at::Tensor bias, int64_t stride = 1, int64_t padding = 0);

    // x [batch, in, height, width].
    at::Tensor operator()(const at::Tensor& x) const;
    size_t nbytes() const { return weight_.defined() ? weight_.nbytes() + bias_.nbytes() : 0; }

private:
    at::Tensor weight_, bias_;
    int64_t stride_ = 1, padding_ = 0;
};

}  // namespace diffusionz
