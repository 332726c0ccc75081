// On the CPU and on GPUs but Hopper: ATen's, oneDNN's or cuDNN's. On Hopper in bfloat16 kernels/conv2d.cu, which also adds the
// residual, or a block's shortcut, and leaves the moments for the next normalisation. Reference: at::conv2d
// (DIFFUSIONZ_DISABLE_KERNELS=conv2d).

#include "ops/conv2d.h"

#include <ATen/Functions.h>

#include "ops/cuda.h"
#include "ops/disabled.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/conv2d.h"
#endif

namespace diffusionz {

Conv2d::Conv2d(at::Tensor weight, at::Tensor bias, int64_t stride, int64_t padding)
    : weight_(weight.contiguous(at::MemoryFormat::ChannelsLast)),
      bias_(std::move(bias)),
      stride_(stride),
      padding_(padding),
      kernel_(stride == 1 && weight_.size(2) == 2 * padding + 1 && conv2d_kernel_takes(weight_)) {}

at::Tensor Conv2d::by_kernel(const at::Tensor& x, Conv2dInputs inputs, ChannelMoments* moments) const {
    inputs.x = x.contiguous(at::MemoryFormat::ChannelsLast);
    inputs.weight = weight_;
    inputs.bias = bias_;
    inputs.first_row = inputs.first_column = -padding_;
    const at::Tensor y =
        at::empty({x.size(0), weight_.size(0), x.size(2), x.size(3)}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
    if (moments) *moments = conv2d_moments(x, weight_.size(0), /*layers=*/1);
    conv2d_kernel(inputs, y, moments ? moments->values : at::Tensor());
    return y;
}

at::Tensor Conv2d::operator()(const at::Tensor& x, const at::Tensor& residual, ChannelMoments* moments) const {
    if (kernel_) {
        Conv2dInputs inputs;
        if (residual.defined()) inputs.residual = residual.contiguous(at::MemoryFormat::ChannelsLast);
        return by_kernel(x, std::move(inputs), moments);
    }
    at::Tensor y = at::conv2d(x, weight_, bias_, {stride_, stride_}, {padding_, padding_});
    return residual.defined() ? y.add_(residual) : y;
}

at::Tensor Conv2d::with_shortcut(const at::Tensor& x, const Conv2d& shortcut, const at::Tensor& shortcut_x,
                                 ChannelMoments* moments) const {
    if (!kernel_ || shortcut.weight_.size(1) % 8 != 0) return (*this)(x, shortcut(shortcut_x), moments);
    Conv2dInputs inputs;
    inputs.shortcut_x = shortcut_x.contiguous(at::MemoryFormat::ChannelsLast);
    inputs.shortcut_weight = shortcut.weight_;
    inputs.shortcut_bias = shortcut.bias_;
    return by_kernel(x, std::move(inputs), moments);
}

bool conv2d_kernel_takes(const at::Tensor& weight) {
#ifdef DIFFUSIONZ_WITH_CUDA
    return !kernel_disabled("conv2d") && weight.is_cuda() && weight.scalar_type() == at::kBFloat16 &&
           weight.size(2) == weight.size(3) &&
           kernels::conv2d_sm90_takes(weight.device().index(), weight.size(1), weight.size(0), weight.size(2));
#else
    (void)weight;
    return false;
#endif
}

void conv2d_kernel([[maybe_unused]] const Conv2dInputs& inputs, [[maybe_unused]] const at::Tensor& y,
                   [[maybe_unused]] const at::Tensor& moments) {
#ifdef DIFFUSIONZ_WITH_CUDA
    const auto data = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; };
    kernels::Conv2dCall call{};
    call.x = data(inputs.x), call.weight = data(inputs.weight), call.bias = data(inputs.bias),
    call.residual = data(inputs.residual);
    call.shortcut_x = data(inputs.shortcut_x), call.shortcut_weight = data(inputs.shortcut_weight);
    call.shortcut_bias = data(inputs.shortcut_bias);
    call.y = y.mutable_data_ptr();
    call.batch = y.size(0), call.out = y.size(1), call.height = y.size(2), call.width = y.size(3);
    call.in = inputs.x.size(1), call.shortcut_in = inputs.shortcut_x.defined() ? inputs.shortcut_x.size(1) : 0;
    call.taps = inputs.weight.size(2), call.first_row = inputs.first_row, call.first_column = inputs.first_column;
    call.image_stride = y.stride(0), call.row_stride = y.stride(2), call.pixel_stride = y.stride(3);
    if (moments.defined()) call.moments = moments.mutable_data_ptr<float>(), call.moments_stride = moments.stride(0);
    check_launch("conv2d", kernels::conv2d_sm90(call, current_stream(y)));
#endif
}

ChannelMoments conv2d_moments(const at::Tensor& x, int64_t out, int64_t layers) {
    ChannelMoments moments;
#ifdef DIFFUSIONZ_WITH_CUDA
    constexpr int64_t kTile = kernels::kConv2dTile;
    moments.rows = x.size(2), moments.columns = x.size(3), moments.layers = layers;
    moments.tile_rows = moments.tile_columns = kTile;
    const int64_t tiles = (moments.rows + kTile - 1) / kTile * ((moments.columns + kTile - 1) / kTile);
    moments.values =
        at::empty({x.size(0), layers * tiles, out, 2}, x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
#else
    (void)x, (void)out, (void)layers;
#endif
    return moments;
}

}  // namespace diffusionz
