// Three rows of the upsampled picture are two rows of the small one: an even output row reads (above, here, here), an odd one
// (here, here, below). So each of the four kinds of output pixel is a 2x2 convolution of the small picture, whose weights are
// sums of the 3x3 ones: 16 products a small pixel instead of 36, and the upsampled picture is never written.
//
// Numbers: exact but for the order of sums; the weights are added in float64 and rounded once.
// Where: on the CPU in float32, and on GPUs where kernels/conv2d.cu runs, which writes each part between the others: a
// decoder's 1024x1024 picture in 16.2 ms on an H100, 20.5 by the reference. Elsewhere the reference.
// Reference: at::upsample_nearest2d and at::conv2d (DIFFUSIONZ_DISABLE_KERNELS=upsample_conv2d).

#include "ops/upsample_conv2d.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "ops/disabled.h"

namespace diffusionz {
namespace {

// The two weights along `dim` (of size 3) for output rows of parity `odd`.
at::Tensor fold(const at::Tensor& weight, int64_t dim, int64_t odd) {
    const auto w = weight.unbind(dim);
    return odd ? at::stack({w[0] + w[1], w[2]}, dim) : at::stack({w[0], w[1] + w[2]}, dim);
}

}  // namespace

UpsampleConv2d::UpsampleConv2d(const at::Tensor& weight, at::Tensor bias) {
    const at::Tensor wide = weight.to(at::kDouble);
    const auto part_weight = [&](size_t part) {
        const auto a = static_cast<int64_t>(part / 2), b = static_cast<int64_t>(part % 2);
        return fold(fold(wide, 2, a), 3, b).to(weight.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast);
    };
    const bool disabled = kernel_disabled("upsample_conv2d");
    if (!disabled && conv2d_kernel_takes(weight)) {
        for (size_t part = 0; part < 4; ++part) part_weights_[part] = part_weight(part);
        bias_ = std::move(bias);
        return;
    }
    split_ = weight.is_cpu() && weight.scalar_type() == at::kFloat && !disabled;
    if (!split_) {
        whole_ = Conv2d(weight, std::move(bias), /*stride=*/1, /*padding=*/1);
        return;
    }
    for (size_t part = 0; part < 4; ++part) parts_[part] = Conv2d(part_weight(part), bias);
}

at::Tensor UpsampleConv2d::by_kernel(const at::Tensor& x, ChannelMoments* moments) const {
    Conv2dInputs inputs;
    inputs.x = x.contiguous(at::MemoryFormat::ChannelsLast);
    inputs.bias = bias_;
    const int64_t height = x.size(2), width = x.size(3), out = bias_.size(0);
    const at::Tensor y =
        at::empty({x.size(0), out, 2 * height, 2 * width}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
    if (moments) *moments = conv2d_moments(x, out, /*layers=*/4);
    for (int64_t part = 0; part < 4; ++part) {
        const int64_t a = part / 2, b = part % 2;
        inputs.weight = part_weights_[static_cast<size_t>(part)];
        inputs.first_row = a - 1, inputs.first_column = b - 1;
        conv2d_kernel(inputs, y.slice(2, a, 2 * height, 2).slice(3, b, 2 * width, 2),
                      moments ? moments->values.chunk(4, 1)[static_cast<size_t>(part)] : at::Tensor());
    }
    return y;
}

at::Tensor UpsampleConv2d::operator()(const at::Tensor& x, ChannelMoments* moments) const {
    if (bias_.defined()) return by_kernel(x, moments);
    const int64_t height = x.size(2), width = x.size(3);
    if (!split_) return whole_(at::upsample_nearest2d(x, {2 * height, 2 * width}));
    const at::Tensor padded = at::constant_pad_nd(x, {1, 1, 1, 1});
    at::Tensor out;
    for (int64_t part = 0; part < 4; ++part) {
        const int64_t a = part / 2, b = part % 2;
        const at::Tensor y = parts_[static_cast<size_t>(part)](padded.narrow(2, a, height + 1).narrow(3, b, width + 1));
        if (!out.defined()) {
            out = at::empty({y.size(0), y.size(1), 2 * height, 2 * width},
                            y.options().memory_format(at::MemoryFormat::ChannelsLast));
        }
        out.slice(2, a, 2 * height, 2).slice(3, b, 2 * width, 2).copy_(y);
    }
    return out;
}

size_t UpsampleConv2d::nbytes() const {
    size_t total = whole_.nbytes() + (bias_.defined() ? bias_.nbytes() : 0);
    for (const Conv2d& part : parts_) total += part.nbytes();
    for (const at::Tensor& weight : part_weights_) total += weight.defined() ? weight.nbytes() : 0;
    return total;
}

}  // namespace diffusionz
