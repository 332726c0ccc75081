// The Flux-type autoencoder between pixels and latents. Reference: diffusers' AutoencoderKL.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "core/json_file.h"
#include "core/weights.h"
#include "ops/conv2d.h"
#include "ops/group_norm.h"
#include "ops/linear.h"
#include "ops/upsample_conv2d.h"

namespace diffusionz {

struct VaeConfig {
    std::vector<int64_t> block_out_channels = {128, 256, 512, 512};
    int64_t layers_per_block = 2;
    int64_t latent_channels = 16;
    int64_t norm_num_groups = 32;
    double scaling_factor = 0.3611;
    double shift_factor = 0.1159;
    bool use_quant_conv = false;
    bool use_post_quant_conv = false;
    bool mid_block_add_attention = true;
    int64_t sample_size = 1024;  // pixels a side that the model was made for

    // Pixels a side of one latent.
    int64_t scale() const { return int64_t{1} << (block_out_channels.size() - 1); }

    static VaeConfig from_json(const JsonFile& json);
    // From the tensors' shapes, with Flux's constants, for files that come without a config.
    static VaeConfig from_shapes(const Checkpoint& checkpoint);
};

class Vae {
public:
    Vae(const VaeConfig& config, const Weights& weights);

    // latents [batch, channels, h, w] as the transformer sees them (scaled) to pixels uint8 [batch, 8h, 8w, 3] on the device.
    at::Tensor decode_on_device(const at::Tensor& latents) const;
    // Bytes that decoding a picture of height x width pixels needs at once, about: the activations of its last and largest stage.
    int64_t decode_nbytes(int64_t height, int64_t width) const;
    // The decoder alone: unscaled latents to [batch, 3, 8h, 8w] in [-1, 1], unclamped.
    at::Tensor decode_raw(const at::Tensor& latents) const;

    // pixels uint8 [height, width, 3] to scaled latents [1, channels, height/8, width/8], float32. The posterior is sampled with
    // `noise` [1, channels, ...], as the reference's image-to-image pipeline does.
    at::Tensor encode(const at::Tensor& pixels, const at::Tensor& noise) const;
    // Whether the checkpoint has an encoder: decoder-only files can still draw from text.
    bool has_encoder() const { return !encoder_.blocks.empty(); }

    const VaeConfig& config() const { return config_; }
    size_t nbytes() const { return nbytes_; }

private:
    struct Norm {
        at::Tensor weight, bias;
    };
    struct Resnet {
        Norm norm1, norm2;
        Conv2d conv1, conv2;
        std::optional<Conv2d> shortcut;
    };
    struct MidAttention {
        Norm norm;
        Linear q, k, v, out;
    };
    struct Stage {
        std::vector<Resnet> resnets;
        // After the resnets, but for the last stage: the decoder's or the encoder's.
        std::optional<UpsampleConv2d> upsample;
        std::optional<Conv2d> downsample;
    };
    // What goes from layer to layer: the numbers, and what the next normalisation must know of them where the last layer left it.
    struct Picture {
        at::Tensor x;
        ChannelMoments moments;
    };
    struct Half {  // an encoder or a decoder
        Conv2d conv_in, conv_out;
        std::vector<Resnet> mid;  // two, around the attention
        std::optional<MidAttention> attention;
        std::vector<Stage> blocks;
        Norm norm_out;
    };

    Conv2d load_conv(const Weights& weights, const std::string& name, int64_t out, int64_t in, int64_t kernel,
                     int64_t stride = 1);
    Norm load_norm(const Weights& weights, const std::string& name, int64_t channels);
    Resnet load_resnet(const Weights& weights, int64_t in, int64_t out);
    void load_middle(const Weights& weights, Half& half, int64_t channels);
    Half load_encoder(const Weights& weights);
    Half load_decoder(const Weights& weights);
    at::Tensor run_norm(const Norm& norm, const Picture& picture, bool silu) const;
    Picture run_resnet(const Resnet& resnet, const Picture& picture) const;
    Picture run_middle(const Half& half, Picture picture) const;
    at::Tensor run_decoder(const at::Tensor& latents, bool pixels) const;

    VaeConfig config_;
    Placement placement_;
    Half encoder_, decoder_;
    std::optional<Conv2d> quant_conv_, post_quant_conv_;
    size_t nbytes_ = 0;
};

}  // namespace diffusionz
