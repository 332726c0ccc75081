// On GPUs in 16 bits one kernel, kernels/norm_conv2d.cu; elsewhere, and with DIFFUSIONZ_DISABLE_KERNELS=norm_conv2d, the
// reference: group_norm, the convolution and ATen's conversions.

#include "ops/norm_conv2d.h"

#include <ATen/Functions.h>

#include "ops/cuda.h"
#include "ops/disabled.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/norm_conv2d.h"
#endif

namespace diffusionz {

at::Tensor norm_conv2d(const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias, int64_t groups,
                       double eps, const ChannelMoments& moments, const Conv2d& conv, bool pixels) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (!kernel_disabled("norm_conv2d") && group_norm_kernel_takes(x) && x.scalar_type() != at::kFloat) {
        const at::Tensor in = x.contiguous(at::MemoryFormat::ChannelsLast);
        const int64_t batch = in.size(0), height = in.size(2), width = in.size(3), out = conv.weight().size(0);
        const at::Tensor factors = group_norm_factors(in, norm_weight, norm_bias, groups, eps, moments);
        at::Tensor y =
            at::empty({batch, height, width, out},
                      in.options().dtype(pixels ? at::kByte : in.scalar_type()).memory_format(at::MemoryFormat::Contiguous));
        if (launched("norm_conv2d",
                     kernels::norm_conv2d(kernel_type(in.scalar_type()), in.const_data_ptr(), factors.const_data_ptr<float>(),
                                          conv.weight().const_data_ptr(), conv.bias().const_data_ptr(), y.mutable_data_ptr(),
                                          pixels, batch, height, width, in.size(1), out, current_stream(in))))
            return pixels ? y : y.permute({0, 3, 1, 2});
    }
#endif
    const at::Tensor image = conv(group_norm(x, norm_weight, norm_bias, groups, eps, /*silu=*/true, moments));
    if (!pixels) return image;
    return image.mul(0.5)
        .add_(0.5)
        .clamp_(0, 1)
        .to(at::kFloat)
        .mul_(255)
        .round_()
        .permute({0, 2, 3, 1})
        .to(at::kByte)
        .contiguous();
}

}  // namespace diffusionz
