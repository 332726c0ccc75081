// Nearest-neighbour upsampling by two, then a 3x3 convolution: what a decoder does between its levels.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "ops/conv2d.h"

namespace diffusionz {

class UpsampleConv2d {
public:
    // weight [out, in, 3, 3]; bias [out].
    UpsampleConv2d(const at::Tensor& weight, at::Tensor bias);

    // x [batch, in, height, width] to [batch, out, 2 height, 2 width], channels-last. `moments` as of Conv2d.
    at::Tensor operator()(const at::Tensor& x, ChannelMoments* moments = nullptr) const;
    size_t nbytes() const;

private:
    at::Tensor by_kernel(const at::Tensor& x, ChannelMoments* moments) const;

    bool split_ = false;
    Conv2d whole_;                            // the reference's
    std::array<Conv2d, 4> parts_;             // of the output pixels (2i + a, 2j + b), at 2a + b
    std::array<at::Tensor, 4> part_weights_;  // the same for the kernel
    at::Tensor bias_;
};

}  // namespace diffusionz
