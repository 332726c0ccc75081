// On the CPU and on GPUs but Hopper: ATen's, oneDNN's or cuDNN's. On Hopper in bfloat16 kernels/conv2d.cu, which also adds the
// residual and leaves the moments for the next normalisation. Reference: at::conv2d (DIFFUSIONZ_DISABLE_KERNELS=conv2d).

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

at::Tensor Conv2d::operator()(const at::Tensor& x, const at::Tensor& residual, ChannelMoments* moments) const {
    if (kernel_) {
        const at::Tensor in = x.contiguous(at::MemoryFormat::ChannelsLast);
        at::Tensor y = at::empty({x.size(0), weight_.size(0), x.size(2), x.size(3)},
                                 x.options().memory_format(at::MemoryFormat::ChannelsLast));
        if (moments) *moments = conv2d_moments(in, weight_.size(0), 1);
        conv2d_kernel(in, weight_, bias_, residual.defined() ? residual.contiguous(at::MemoryFormat::ChannelsLast) : residual, y,
                      -padding_, -padding_, moments ? moments->values : at::Tensor());
        return y;
    }
    at::Tensor y = at::conv2d(x, weight_, bias_, {stride_, stride_}, {padding_, padding_});
    return residual.defined() ? y.add_(residual) : y;
}

bool conv2d_kernel_takes(const at::Tensor& weight) {
    static const bool disabled = kernel_disabled("conv2d");
#ifdef DIFFUSIONZ_WITH_CUDA
    return !disabled && weight.is_cuda() && weight.scalar_type() == at::kBFloat16 && weight.size(2) == weight.size(3) &&
           kernels::conv2d_sm90_takes(weight.device().index(), weight.size(1), weight.size(0), weight.size(2));
#else
    (void)weight;
    (void)disabled;
    return false;
#endif
}

void conv2d_kernel(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& residual, const at::Tensor& y,
                   int64_t first_row, int64_t first_column, const at::Tensor& moments) {
#ifdef DIFFUSIONZ_WITH_CUDA
    kernels::Conv2dCall call{};
    call.x = x.const_data_ptr();
    call.weight = weight.const_data_ptr();
    call.bias = bias.const_data_ptr();
    call.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
    call.y = y.mutable_data_ptr();
    call.batch = x.size(0), call.in = x.size(1), call.height = x.size(2), call.width = x.size(3);
    call.out = weight.size(0), call.taps = weight.size(2), call.first_row = first_row, call.first_column = first_column;
    call.image_stride = y.stride(0), call.row_stride = y.stride(2), call.pixel_stride = y.stride(3);
    if (moments.defined()) call.moments = moments.mutable_data_ptr<float>(), call.moments_stride = moments.stride(0);
    check_launch("conv2d", kernels::conv2d_sm90(call, current_stream(x)));
#else
    (void)x, (void)weight, (void)bias, (void)residual, (void)y, (void)first_row, (void)first_column, (void)moments;
#endif
}

ChannelMoments conv2d_moments(const at::Tensor& x, int64_t out, int64_t layers) {
    ChannelMoments moments;
#ifdef DIFFUSIONZ_WITH_CUDA
    constexpr int64_t kTile = kernels::kConv2dTile;
    moments.rows = x.size(2), moments.columns = x.size(3), moments.layers = layers;
    moments.tile_rows = moments.tile_columns = kTile;
    const int64_t tiles = (moments.rows + kTile - 1) / kTile * ((moments.columns + kTile - 1) / kTile);
    moments.values = at::empty({x.size(0), layers * tiles, out, 2}, x.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
#else
    (void)x, (void)out, (void)layers;
#endif
    return moments;
}

}  // namespace diffusionz
