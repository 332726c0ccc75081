// torch.ops.diffusionz: the operations of the autoencoder, and attention.
#include <torch/library.h>

#include <map>
#include <memory>

#include "core/checkpoint.h"
#include "core/error.h"
#include "core/weights.h"
#include "ops/attention.h"
#include "ops/conv2d.h"
#include "ops/group_norm.h"
#include "ops/norm_conv2d.h"
#include "ops/upsample_conv2d.h"
#include "zimage/vae.h"

namespace diffusionz {
namespace {

using Optional = std::optional<at::Tensor>;

// Loaded once.
const Vae& vae_of(const std::string& file, const Placement& placement) {
    static std::map<std::string, std::unique_ptr<const Vae>> known;
    std::unique_ptr<const Vae>& vae = known[concat(file, " ", placement.device, " ", placement.dtype)];
    if (!vae) {
        const auto checkpoint = std::make_shared<const Checkpoint>(Checkpoint::from_file(file));
        vae = std::make_unique<const Vae>(VaeConfig::from_shapes(*checkpoint), Weights(checkpoint, placement));
    }
    return *vae;
}

TORCH_LIBRARY_FRAGMENT(diffusionz, m) {
    m.def("group_norm", [](const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t groups, double eps, bool silu) {
        return group_norm(x, weight, bias, groups, eps, silu);
    });
    m.def("conv2d", [](const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const Optional& residual) {
        return Conv2d(weight, bias, 1, weight.size(2) / 2)(x, residual.value_or(at::Tensor()));
    });
    // A convolution and, by the moments that it left, the normalisation of its result.
    m.def("conv2d_group_norm", [](const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const Optional& residual,
                                  const at::Tensor& norm_weight, const at::Tensor& norm_bias, int64_t groups, double eps) {
        ChannelMoments moments;
        const at::Tensor y = Conv2d(weight, bias, 1, weight.size(2) / 2)(x, residual.value_or(at::Tensor()), &moments);
        return std::make_tuple(y, group_norm(y, norm_weight, norm_bias, groups, eps, /*silu=*/true, moments), moments.values.defined());
    });
    m.def("conv2d_with_shortcut", [](const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& shortcut_x,
                                     const at::Tensor& shortcut_weight, const at::Tensor& shortcut_bias) {
        return Conv2d(weight, bias, 1, 1).with_shortcut(x, Conv2d(shortcut_weight, shortcut_bias), shortcut_x);
    });
    m.def("upsample_conv2d_group_norm", [](const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                                           const at::Tensor& norm_weight, const at::Tensor& norm_bias, int64_t groups, double eps) {
        ChannelMoments moments;
        const at::Tensor y = UpsampleConv2d(weight, bias)(x, &moments);
        return std::make_tuple(y, group_norm(y, norm_weight, norm_bias, groups, eps, /*silu=*/true, moments));
    });
    m.def("norm_conv2d", [](const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias, int64_t groups, double eps,
                            const at::Tensor& weight, const at::Tensor& bias, bool pixels) {
        return norm_conv2d(x, norm_weight, norm_bias, groups, eps, {}, Conv2d(weight, bias, 1, 1), pixels);
    });
    // The two halves of a file of weights. Decoder: unscaled latents to [batch, 3, height, width], or scaled ones to pixels.
    m.def("vae_decode", [](const std::string& file, const at::Tensor& latents, at::ScalarType dtype, bool pixels) {
        const Vae& vae = vae_of(file, Placement{latents.device(), dtype});
        return pixels ? vae.decode_on_device(latents) : vae.decode_raw(latents);
    });
    m.def("vae_encode", [](const std::string& file, const at::Tensor& pixels, const at::Tensor& noise, at::ScalarType dtype) {
        return vae_of(file, Placement{noise.device(), dtype}).encode(pixels, noise);
    });
    m.def("attention", [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) { return attention(q, k, v, causal); });
    m.def("attention_sm90", [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) { return attention_sm90(q, k, v); });
}

}  // namespace
}  // namespace diffusionz
