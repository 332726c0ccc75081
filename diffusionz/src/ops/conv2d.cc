#include "ops/conv2d.h"

#include <ATen/Functions.h>

namespace diffusionz {

Conv2d::Conv2d(at::Tensor weight, at::Tensor bias, int64_t stride, int64_t padding)
    : weight_(weight.contiguous(at::MemoryFormat::ChannelsLast)), bias_(std::move(bias)), stride_(stride), padding_(padding) {}

at::Tensor Conv2d::operator()(const at::Tensor& x) const {
    return at::conv2d(x, weight_, bias_, {stride_, stride_}, {padding_, padding_});
}

}  // namespace diffusionz
