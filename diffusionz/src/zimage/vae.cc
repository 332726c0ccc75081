#include "zimage/vae.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>

#include "core/error.h"
#include "ops/attention.h"
#include "ops/group_norm.h"
#include "ops/norm_conv2d.h"

namespace diffusionz {
namespace {

constexpr double kNormEps = 1e-6;

// Fails with E_MODEL.
void check_channels(const VaeConfig& config, const std::string& name) {
    if (config.block_out_channels.empty() || config.block_out_channels.size() > 8)
        fail(DIFFUSIONZ_E_MODEL, name, ": block_out_channels must have 1 to 8 entries");
    for (const int64_t channels : config.block_out_channels) {
        if (channels % config.norm_num_groups != 0) {
            fail(DIFFUSIONZ_E_MODEL, name, ": block_out_channels ", shape_text(config.block_out_channels),
                 " must be multiples of norm_num_groups ", config.norm_num_groups);
        }
    }
}

}  // namespace

VaeConfig VaeConfig::from_json(const JsonFile& json) {
    const std::string type = json.text("_class_name", "AutoencoderKL");
    if (type != "AutoencoderKL") fail(DIFFUSIONZ_E_MODEL, json.name(), ": _class_name is '", type, "'; it must be AutoencoderKL");
    VaeConfig config;
    config.block_out_channels = json.integers("block_out_channels", {64}, 1, 1 << 14);
    config.layers_per_block = json.integer("layers_per_block", 1, 1, 64);
    config.latent_channels = json.integer("latent_channels", 4, 1, 1024);
    config.norm_num_groups = json.integer("norm_num_groups", 32, 1, 1024);
    config.scaling_factor = json.number("scaling_factor", 0.18215, 1e-6, 1e6);
    config.shift_factor = json.number("shift_factor", 0.0, -1e6, 1e6);
    config.use_quant_conv = json.boolean("use_quant_conv", true);
    config.use_post_quant_conv = json.boolean("use_post_quant_conv", true);
    config.mid_block_add_attention = json.boolean("mid_block_add_attention", true);
    config.sample_size = json.integer("sample_size", config.sample_size, 1, 1 << 20);
    check_channels(config, json.name());
    for (const char* key : {"in_channels", "out_channels"}) {
        if (json.integer(key, 3, 1, 1024) != 3) fail(DIFFUSIONZ_E_MODEL, json.name(), ": ", key, " must be 3");
    }
    return config;
}

VaeConfig VaeConfig::from_shapes(const Checkpoint& checkpoint) {
    VaeConfig config;
    config.block_out_channels.clear();
    int64_t blocks = 0;
    while (checkpoint.has_below(concat("decoder.up_blocks.", blocks, '.'))) ++blocks;
    for (int64_t i = blocks - 1; i >= 0; --i)
        config.block_out_channels.push_back(checkpoint.extent(concat("decoder.up_blocks.", i, ".resnets.0.conv1.weight"), 0));
    int64_t resnets = 0;
    while (checkpoint.has_below(concat("decoder.up_blocks.0.resnets.", resnets, '.'))) ++resnets;
    config.layers_per_block = resnets - 1;
    config.latent_channels = checkpoint.extent("decoder.conv_in.weight", 1);
    config.use_quant_conv = checkpoint.has("quant_conv.weight");
    config.use_post_quant_conv = checkpoint.has("post_quant_conv.weight");
    config.mid_block_add_attention = checkpoint.has_below("decoder.mid_block.attentions.0.");
    check_channels(config, checkpoint.name());
    return config;
}

Vae::Vae(const VaeConfig& config, const Weights& weights) : config_(config), placement_(weights.placement()) {
    const int64_t latents = config.latent_channels;
    if (config.use_post_quant_conv) post_quant_conv_ = load_conv(weights, "post_quant_conv", latents, latents, 1);
    decoder_ = load_decoder(weights.below("decoder."));
    if (!weights.has("encoder.conv_in.weight")) return;
    if (config.use_quant_conv) quant_conv_ = load_conv(weights, "quant_conv", 2 * latents, 2 * latents, 1);
    encoder_ = load_encoder(weights.below("encoder."));
}

Conv2d Vae::load_conv(const Weights& weights, const std::string& name, int64_t out, int64_t in, int64_t kernel, int64_t stride) {
    // A strided convolution follows an explicit padding of one side, so it has none of its own.
    Conv2d conv(weights.get(name + ".weight", {out, in, kernel, kernel}), weights.get(name + ".bias", {out}), stride,
                stride == 1 ? kernel / 2 : 0);
    nbytes_ += conv.nbytes();
    return conv;
}

Vae::Norm Vae::load_norm(const Weights& weights, const std::string& name, int64_t channels) {
    return {weights.get(name + ".weight", {channels}), weights.get(name + ".bias", {channels})};
}

Vae::Resnet Vae::load_resnet(const Weights& weights, int64_t in, int64_t out) {
    Resnet resnet{load_norm(weights, "norm1", in),
                  load_norm(weights, "norm2", out),
                  load_conv(weights, "conv1", out, in, 3),
                  load_conv(weights, "conv2", out, out, 3),
                  {}};
    if (in != out) resnet.shortcut = load_conv(weights, "conv_shortcut", out, in, 1);
    return resnet;
}

void Vae::load_middle(const Weights& weights, Half& half, int64_t channels) {
    half.mid.push_back(load_resnet(weights.below("mid_block.resnets.0."), channels, channels));
    half.mid.push_back(load_resnet(weights.below("mid_block.resnets.1."), channels, channels));
    half.norm_out = {};
    if (!config_.mid_block_add_attention) return;
    const Weights attention = weights.below("mid_block.attentions.0.");
    const auto linear = [&](const std::string& name) {
        Linear layer(attention.get(name + ".weight", {channels, channels}), attention.get(name + ".bias", {channels}));
        nbytes_ += layer.nbytes();
        return layer;
    };
    half.attention.emplace(MidAttention{load_norm(attention, "group_norm", channels), linear("to_q"), linear("to_k"),
                                        linear("to_v"), linear("to_out.0")});
}

Vae::Half Vae::load_decoder(const Weights& weights) {
    Half half;
    const std::vector<int64_t> channels(config_.block_out_channels.rbegin(), config_.block_out_channels.rend());
    half.conv_in = load_conv(weights, "conv_in", channels[0], config_.latent_channels, 3);
    load_middle(weights, half, channels[0]);
    int64_t in = channels[0];
    for (size_t i = 0; i < channels.size(); ++i) {
        const Weights block = weights.below(concat("up_blocks.", i, "."));
        Stage stage;
        for (int64_t j = 0; j <= config_.layers_per_block; ++j, in = channels[i])
            stage.resnets.push_back(load_resnet(block.below(concat("resnets.", j, ".")), in, channels[i]));
        if (i + 1 < channels.size()) {
            stage.upsample.emplace(block.get("upsamplers.0.conv.weight", {in, in, 3, 3}),
                                   block.get("upsamplers.0.conv.bias", {in}));
            nbytes_ += stage.upsample->nbytes();
        }
        half.blocks.push_back(std::move(stage));
    }
    half.norm_out = load_norm(weights, "conv_norm_out", in);
    half.conv_out = load_conv(weights, "conv_out", 3, in, 3);
    return half;
}

Vae::Half Vae::load_encoder(const Weights& weights) {
    Half half;
    const std::vector<int64_t>& channels = config_.block_out_channels;
    half.conv_in = load_conv(weights, "conv_in", channels[0], 3, 3);
    int64_t in = channels[0];
    for (size_t i = 0; i < channels.size(); ++i) {
        const Weights block = weights.below(concat("down_blocks.", i, "."));
        Stage stage;
        for (int64_t j = 0; j < config_.layers_per_block; ++j, in = channels[i])
            stage.resnets.push_back(load_resnet(block.below(concat("resnets.", j, ".")), in, channels[i]));
        if (i + 1 < channels.size()) stage.downsample = load_conv(block, "downsamplers.0.conv", in, in, 3, 2);
        half.blocks.push_back(std::move(stage));
    }
    load_middle(weights, half, in);
    half.norm_out = load_norm(weights, "conv_norm_out", in);
    half.conv_out = load_conv(weights, "conv_out", 2 * config_.latent_channels, in, 3);
    return half;
}

at::Tensor Vae::run_norm(const Norm& norm, const Picture& picture, bool silu) const {
    return group_norm(picture.x, norm.weight, norm.bias, config_.norm_num_groups, kNormEps, silu, picture.moments);
}

Vae::Picture Vae::run_resnet(const Resnet& resnet, const Picture& picture) const {
    Picture inner, result;
    inner.x = resnet.conv1(run_norm(resnet.norm1, picture, true), {}, &inner.moments);
    inner.x = run_norm(resnet.norm2, inner, true);
    result.x = resnet.shortcut ? resnet.conv2.with_shortcut(inner.x, *resnet.shortcut, picture.x, &result.moments)
                               : resnet.conv2(inner.x, picture.x, &result.moments);
    return result;
}

Vae::Picture Vae::run_middle(const Half& half, Picture picture) const {
    picture = run_resnet(half.mid[0], picture);
    if (half.attention) {
        const int64_t height = picture.x.size(2), width = picture.x.size(3);
        // Channels-last memory is [tokens, channels] already.
        const at::Tensor tokens = run_norm(half.attention->norm, picture, false).permute({0, 2, 3, 1}).flatten(1, 2);
        const auto one_head = [](const at::Tensor& t) { return t.unsqueeze(2); };
        const at::Tensor mixed =
            half.attention->out(attention(one_head(half.attention->q(tokens)), one_head(half.attention->k(tokens)),
                                          one_head(half.attention->v(tokens)), /*causal=*/false));
        picture = {picture.x + mixed.unflatten(1, {height, width}).permute({0, 3, 1, 2}), {}};
    }
    return run_resnet(half.mid[1], picture);
}

at::Tensor Vae::run_decoder(const at::Tensor& latents, bool pixels) const {
    at::Tensor x = latents.to(placement_.dtype).contiguous(at::MemoryFormat::ChannelsLast);
    if (post_quant_conv_) x = (*post_quant_conv_)(x);
    Picture picture;
    picture.x = decoder_.conv_in(x, {}, &picture.moments);
    picture = run_middle(decoder_, std::move(picture));
    for (const Stage& stage : decoder_.blocks) {
        for (const Resnet& resnet : stage.resnets) picture = run_resnet(resnet, picture);
        if (!stage.upsample) continue;
        Picture larger;
        larger.x = (*stage.upsample)(picture.x, &larger.moments);
        picture = std::move(larger);
    }
    return norm_conv2d(picture.x, decoder_.norm_out.weight, decoder_.norm_out.bias, config_.norm_num_groups, kNormEps,
                       picture.moments, decoder_.conv_out, pixels);
}

int64_t Vae::decode_nbytes(int64_t height, int64_t width) const {
    const auto& channels = config_.block_out_channels;
    const int64_t widest = channels.size() > 1 ? std::max(channels[0], channels[1]) : channels[0];
    constexpr int64_t kTensorsAtOnce =
        3;  // a residual block holds its input, the normalised input and what a convolution makes of it
    return kTensorsAtOnce * height * width * widest * static_cast<int64_t>(c10::elementSize(placement_.dtype));
}

at::Tensor Vae::decode_raw(const at::Tensor& latents) const { return run_decoder(latents, /*pixels=*/false); }

at::Tensor Vae::decode_on_device(const at::Tensor& latents) const {
    return run_decoder(latents.to(placement_.dtype) / config_.scaling_factor + config_.shift_factor, /*pixels=*/true);
}

at::Tensor Vae::encode(const at::Tensor& pixels, const at::Tensor& noise) const {
    if (!has_encoder()) fail(DIFFUSIONZ_E_ARGUMENT, "image to image needs the VAE's encoder, and this model has none");
    at::Tensor x = pixels.to(placement_.device).to(at::kFloat).div_(255).mul_(2).sub_(1).permute({2, 0, 1}).unsqueeze(0);
    x = x.to(placement_.dtype).contiguous(at::MemoryFormat::ChannelsLast);
    Picture picture;
    picture.x = encoder_.conv_in(x, {}, &picture.moments);
    for (const Stage& stage : encoder_.blocks) {
        for (const Resnet& resnet : stage.resnets) picture = run_resnet(resnet, picture);
        if (stage.downsample) picture = {(*stage.downsample)(at::constant_pad_nd(picture.x, {0, 1, 0, 1})), {}};
    }
    x = encoder_.conv_out(run_norm(encoder_.norm_out, run_middle(encoder_, std::move(picture)), true));
    if (quant_conv_) x = (*quant_conv_)(x);
    const auto moments = x.to(at::kFloat).contiguous().chunk(2, 1);
    const at::Tensor deviation = moments[1].clamp(-30.0, 20.0).mul_(0.5).exp_();
    return (moments[0] + deviation * noise.to(placement_.device) - config_.shift_factor) * config_.scaling_factor;
}

}  // namespace diffusionz
