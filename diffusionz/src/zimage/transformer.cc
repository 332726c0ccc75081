#include "zimage/transformer.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <cmath>
#include <numeric>

#include "core/error.h"
#include "ops/attention.h"
#include "ops/gated_linear.h"
#include "ops/modulated_norm.h"
#include "ops/patchify.h"
#include "ops/qk_norm_rope.h"
#include "ops/rms_norm.h"

namespace diffusionz {
namespace {

constexpr int64_t kAdalnDim = 256;         // or dim where that is smaller
constexpr int64_t kTimeFrequencies = 256;  // sinusoid's width
constexpr double kTimeMaxPeriod = 10000;
constexpr double kFinalNormEps = 1e-6;

int64_t padding_of(int64_t tokens) {
    return (Transformer::kTokensMultiple - tokens % Transformer::kTokensMultiple) % Transformer::kTokensMultiple;
}

// Fails with E_MODEL.
void check_heads(const TransformerConfig& config, const std::string& name) {
    const int64_t sum = std::accumulate(config.axes_dims.begin(), config.axes_dims.end(), int64_t{0});
    bool even = config.axes_dims.size() == 3 && config.axes_lens.size() == 3;
    for (const int64_t axis : config.axes_dims) even = even && axis % 2 == 0;
    if (config.num_heads < 1 || config.num_kv_heads < 1 || config.dim % config.num_heads != 0 ||
        config.num_heads % config.num_kv_heads != 0 || !even || sum != config.head_dim()) {
        fail(DIFFUSIONZ_E_MODEL, name, ": dim ", config.dim, ", n_heads ", config.num_heads, ", n_kv_heads ", config.num_kv_heads,
             ", axes_dims ", shape_text(config.axes_dims),
             " do not fit together: heads divide dim, key-value heads divide heads, three even axes add up to dim / n_heads");
    }
}

}  // namespace

TransformerConfig TransformerConfig::from_json(const JsonFile& json) {
    const std::string type = json.text("_class_name", "ZImageTransformer2DModel");
    if (type != "ZImageTransformer2DModel")
        fail(DIFFUSIONZ_E_MODEL, json.name(), ": _class_name is '", type, "'; it must be ZImageTransformer2DModel");
    TransformerConfig config;
    config.in_channels = json.integer("in_channels", config.in_channels, 1, 1024);
    config.dim = json.integer("dim", config.dim, 1, 1 << 16);
    config.num_layers = json.integer("n_layers", config.num_layers, 1, 1024);
    config.num_refiner_layers = json.integer("n_refiner_layers", config.num_refiner_layers, 0, 1024);
    config.num_heads = json.integer("n_heads", config.num_heads, 1, 1024);
    config.num_kv_heads = json.integer("n_kv_heads", config.num_heads, 1, 1024);
    config.caption_dim = json.integer("cap_feat_dim", config.caption_dim, 1, 1 << 16);
    config.norm_eps = json.number("norm_eps", config.norm_eps, 0, 1);
    config.qk_norm = json.boolean("qk_norm", config.qk_norm);
    config.rope_theta = json.number("rope_theta", config.rope_theta, 1, 1e12);
    config.t_scale = json.number("t_scale", config.t_scale, 0, 1e9);
    config.axes_dims = json.integers("axes_dims", config.axes_dims, 2, 1024);
    config.axes_lens = json.integers("axes_lens", {1024, 512, 512}, 1, 1 << 20);
    if (json.integers("all_patch_size", {2}, 1, 64) != std::vector<int64_t>{Transformer::kPatch} ||
        json.integers("all_f_patch_size", {1}, 1, 64) != std::vector<int64_t>{1}) {
        fail(DIFFUSIONZ_E_MODEL, json.name(), ": all_patch_size must be [2] and all_f_patch_size [1]");
    }
    if (json.has("siglip_feat_dim"))
        fail(DIFFUSIONZ_E_MODEL, json.name(), ": a Z-Image-Omni model (siglip_feat_dim) is not supported");
    check_heads(config, json.name());
    return config;
}

TransformerConfig TransformerConfig::from_shapes(const Checkpoint& checkpoint) {
    TransformerConfig config;
    const std::string block = "layers.0.attention.";
    config.dim = checkpoint.extent("all_x_embedder.2-1.weight", 0);
    config.in_channels = checkpoint.extent("all_x_embedder.2-1.weight", 1) / (Transformer::kPatch * Transformer::kPatch);
    config.caption_dim = checkpoint.extent("cap_embedder.1.weight", 1);
    const int64_t head_dim = checkpoint.extent(block + "norm_q.weight", 0);
    config.num_heads = checkpoint.extent(block + "to_q.weight", 0) / head_dim;
    config.num_kv_heads = checkpoint.extent(block + "to_k.weight", 0) / head_dim;
    config.axes_dims = {head_dim / 4, head_dim / 8 * 3, head_dim / 8 * 3};  // (32, 48, 48) of 128
    // A layer counts with any of its tensors: one that lacks some is damaged, not a shorter model.
    config.num_layers = config.num_refiner_layers = 0;
    while (checkpoint.has_below(concat("layers.", config.num_layers, '.'))) ++config.num_layers;
    while (checkpoint.has_below(concat("noise_refiner.", config.num_refiner_layers, '.'))) ++config.num_refiner_layers;
    check_heads(config, checkpoint.name());
    return config;
}

Transformer::Transformer(const TransformerConfig& config, const Weights& weights)
    : config_(config), placement_(weights.placement()) {
    const int64_t dim = config.dim, adaln = std::min(dim, kAdalnDim), patch = kPatch * kPatch * config.in_channels;
    const auto linear = [&](const std::string& name, int64_t out, int64_t in) {
        return Linear(weights.get(name + ".weight", {out, in}), weights.get(name + ".bias", {out}));
    };
    image_embedder_ = linear("all_x_embedder.2-1", dim, patch);
    caption_norm_ = weights.get("cap_embedder.0.weight", {config.caption_dim});
    caption_embedder_ = linear("cap_embedder.1", dim, config.caption_dim);
    const int64_t time_hidden = weights.extent("t_embedder.mlp.0.weight", 0);
    time_mlp0_ = linear("t_embedder.mlp.0", time_hidden, kTimeFrequencies);
    time_mlp2_ = linear("t_embedder.mlp.2", adaln, time_hidden);
    final_linear_ = linear("all_final_layer.2-1.linear", patch, dim);
    final_modulation_ = linear("all_final_layer.2-1.adaLN_modulation.1", dim, adaln);
    image_pad_ = weights.get("x_pad_token", {1, dim});
    caption_pad_ = weights.get("cap_pad_token", {1, dim});

    std::vector<at::Tensor> modulation_weights, modulation_biases;
    // What FP8 leaves in the weights' precision: what runs once a call (the caption's refiner, the embeddings of caption and time,
    // the modulation) and would save nothing, and the first and the last product of a step, 64 numbers wide. No block and no
    // product of a block is among them: kept in bfloat16, none of them brings a picture nearer to float32's by what it costs (the
    // table is in docs/gpu.md).
    const auto load = [&](std::vector<Block>& blocks, const char* name, int64_t count, bool modulated, Products products) {
        for (int64_t i = 0; i < count; ++i) {
            const Weights block_weights = weights.below(concat(name, '.', i, '.'));
            blocks.push_back(load_block(block_weights, products));
            if (modulated) {
                blocks.back().modulation = static_cast<int64_t>(modulation_weights.size());
                modulation_weights.push_back(block_weights.get("adaLN_modulation.0.weight", {4 * dim, adaln}));
                modulation_biases.push_back(block_weights.get("adaLN_modulation.0.bias", {4 * dim}));
            }
            weights.checkpoint().release_pages();
        }
        for (int64_t i = 0; i < count; ++i) add_lora_targets(concat(name, '.', i), blocks[static_cast<size_t>(i)]);
    };
    load(noise_refiner_, "noise_refiner", config.num_refiner_layers, true, placement_.products);
    load(context_refiner_, "context_refiner", config.num_refiner_layers, false, Products::plain);
    load(layers_, "layers", config.num_layers, true, placement_.products);
    if (!modulation_weights.empty()) modulation_ = Linear(at::cat(modulation_weights), at::cat(modulation_biases));

    const auto target = [&](const std::string& name, const Linear& layer) {
        lora_targets_.push_back({name, {&layer, 0, layer.out_features()}});
    };
    target("all_x_embedder.2-1", image_embedder_);
    target("x_embedder", image_embedder_);
    target("cap_embedder.1", caption_embedder_);
    target("t_embedder.mlp.0", time_mlp0_);
    target("t_embedder.mlp.2", time_mlp2_);
    target("all_final_layer.2-1.linear", final_linear_);
    target("final_layer.linear", final_linear_);
    target("all_final_layer.2-1.adaLN_modulation.1", final_modulation_);
    target("final_layer.adaLN_modulation.1", final_modulation_);

    // Angles in float64, rounded once: bfloat16 or float32 frequencies lose a quarter turn at position 500.
    const auto f64 = at::TensorOptions().dtype(at::kDouble);
    for (size_t axis = 0; axis < config.axes_dims.size(); ++axis) {
        const int64_t d = config.axes_dims[axis];
        const at::Tensor frequencies = at::reciprocal(at::pow(config.rope_theta, at::arange(0, d, 2, f64) / d));
        const at::Tensor angles = at::outer(at::arange(config.axes_lens[axis], f64), frequencies).to(at::kFloat);
        axis_tables_.push_back(at::polar(at::ones_like(angles), angles));
    }
}

Transformer::Block Transformer::load_block(const Weights& weights, Products products) const {
    const int64_t dim = config_.dim, ffn = config_.ffn_dim(), d = config_.head_dim(), kv = config_.num_kv_heads * d;
    const auto fused = [&](const std::vector<std::string>& names, const std::vector<std::vector<int64_t>>& shapes) {
        return Linear(weights.get_fused(names, shapes), {}, products);
    };
    Block block;
    block.qkv =
        fused({"attention.to_q.weight", "attention.to_k.weight", "attention.to_v.weight"}, {{dim, dim}, {kv, dim}, {kv, dim}});
    block.out = Linear(weights.get("attention.to_out.0.weight", {dim, dim}), {}, products);
    block.w13 = fused({"feed_forward.w1.weight", "feed_forward.w3.weight"}, {{ffn, dim}, {ffn, dim}});
    block.w2 = Linear(weights.get("feed_forward.w2.weight", {dim, ffn}), {}, products);
    block.attention_norm1 = weights.get("attention_norm1.weight", {dim});
    block.attention_norm2 = weights.get("attention_norm2.weight", {dim});
    block.ffn_norm1 = weights.get("ffn_norm1.weight", {dim});
    block.ffn_norm2 = weights.get("ffn_norm2.weight", {dim});
    if (config_.qk_norm) {
        block.q_norm = weights.get("attention.norm_q.weight", {d});
        block.k_norm = weights.get("attention.norm_k.weight", {d});
    }
    return block;
}

void Transformer::add_lora_targets(const std::string& name, const Block& block) {
    const int64_t dim = config_.dim, kv = config_.num_kv_heads * config_.head_dim(), ffn = config_.ffn_dim();
    const auto add = [&](const std::string& module, const Linear& linear, int64_t row_begin, int64_t rows) {
        lora_targets_.push_back({name + "." + module, {&linear, row_begin, rows}});
    };
    add("attention.to_q", block.qkv, 0, dim);
    add("attention.to_k", block.qkv, dim, kv);
    add("attention.to_v", block.qkv, dim + kv, kv);
    add("attention.qkv", block.qkv, 0, dim + 2 * kv);
    add("attention.to_out.0", block.out, 0, dim);
    add("attention.out", block.out, 0, dim);
    add("feed_forward.w1", block.w13, 0, ffn);
    add("feed_forward.w3", block.w13, ffn, ffn);
    add("feed_forward.w2", block.w2, 0, dim);
    if (block.modulation >= 0) add("adaLN_modulation.0", modulation_, block.modulation * 4 * dim, 4 * dim);
}

Transformer::Factors Transformer::factors_of(const Block& block, const Modulation* modulation) {
    if (block.modulation < 0) return {};
    const at::Tensor own = modulation->blocks.select(1, block.modulation);
    return {own.narrow(1, 0, 1), own.narrow(1, 1, 1), own.narrow(1, 2, 1), own.narrow(1, 3, 1)};
}

Form Transformer::form_for(const Linear& linear, const LoraPairs* lora) {
    if (!linear.quantized()) return Form::plain;
    return lora ? Form::both : Form::fp8;
}

Transformer::Stream Transformer::enter(const Block& block, const at::Tensor& x, const Modulation* modulation,
                                       const LoraPairs* lora) const {
    return {x, modulated_norm(x, block.attention_norm1, config_.norm_eps, factors_of(block, modulation).scale_attention,
                              form_for(block.qkv, lora))};
}

Transformer::Stream Transformer::run_block(const Block& block, const Block* next, const Stream& in, const at::Tensor& rope,
                                           const Modulation* modulation, int64_t keep, const LoraPairs* lora) const {
    const int64_t d = config_.head_dim(), heads = config_.num_heads, kv_heads = config_.num_kv_heads;
    const Factors factors = factors_of(block, modulation);
    constexpr double kQkNormEps = 1e-5;  // fixed in the reference, whatever norm_eps is
    const auto qkv = qk_norm_rope(block.qkv(in.normed, lora), block.q_norm, block.k_norm, kQkNormEps, rope, heads, kv_heads,
                                  RopePairs::interleaved)
                         .split_with_sizes({heads * d, kv_heads * d, kv_heads * d}, -1);
    const at::Tensor attended =
        attention(qkv[0].narrow(1, 0, keep).unflatten(-1, {heads, d}), qkv[1].unflatten(-1, {kv_heads, d}),
                  qkv[2].unflatten(-1, {kv_heads, d}), /*causal=*/false);
    Residual residual =
        gated_residual(in.x.narrow(1, 0, keep), block.out(attended, lora), block.attention_norm2, config_.norm_eps,
                       factors.gate_attention, block.ffn_norm1, factors.scale_ffn, form_for(block.w13, lora));

    const Activation gated = gated_linear(block.w13, residual.normed, lora, form_for(block.w2, lora));
    const at::Tensor next_weight = next ? next->attention_norm1 : at::Tensor();
    const at::Tensor next_scale = next ? factors_of(*next, modulation).scale_attention : at::Tensor();
    residual = gated_residual(residual.sum, block.w2(gated, lora), block.ffn_norm2, config_.norm_eps, factors.gate_ffn,
                              next_weight, next_scale, next ? form_for(next->qkv, lora) : Form::plain);
    return {residual.sum, residual.normed};
}

at::Tensor Transformer::run_blocks(const std::vector<Block>& blocks, const char* name, const at::Tensor& x,
                                   const at::Tensor& rope, const Modulation* modulation, int64_t keep, const LoraPairs* lora,
                                   const Watch& watch) const {
    if (blocks.empty()) return x.narrow(1, 0, keep);
    Stream stream = enter(blocks[0], x, modulation, lora);
    for (size_t i = 0; i < blocks.size(); ++i) {
        const bool last = i + 1 == blocks.size();
        stream = run_block(blocks[i], last ? nullptr : &blocks[i + 1], stream, rope, modulation, last ? keep : x.size(1), lora);
        if (watch) watch(concat(name, '.', i), stream.x);
    }
    return stream.x;
}

at::Tensor Transformer::embed_times(const std::vector<float>& times, const LoraPairs* lora) const {
    const auto f32 = at::TensorOptions().dtype(at::kFloat);
    constexpr int64_t half = kTimeFrequencies / 2;
    const at::Tensor frequencies = at::exp(at::arange(half, f32) * (-std::log(kTimeMaxPeriod)) / half);
    const at::Tensor angles = at::outer(at::tensor(times, f32) * static_cast<float>(config_.t_scale), frequencies);
    const at::Tensor features =
        at::cat({angles.cos(), angles.sin()}, -1).to(at::TensorOptions().device(placement_.device).dtype(placement_.dtype));
    return time_mlp2_(at::silu(time_mlp0_(features, lora)), lora);
}

Transformer::Modulation Transformer::modulate(const std::vector<float>& times, const LoraPairs* lora) const {
    const at::Tensor features = embed_times(times, lora);
    const int64_t count = static_cast<int64_t>(times.size());
    Modulation modulation;
    modulation.blocks = at::empty({count, 0, 4, config_.dim}, features.options());
    if (modulation_.out_features() > 0) {
        modulation.blocks = modulation_(features, lora).view({count, -1, 4, config_.dim});
        modulation.blocks.slice(2, 0, 4, 2).add_(1);
        modulation.blocks.slice(2, 1, 4, 2).tanh_();
    }
    modulation.final_scale = final_modulation_(at::silu(features), lora).add_(1);
    return modulation;
}

at::Tensor Transformer::refine_caption(const at::Tensor& features, const LoraPairs* lora) const {
    const int64_t tokens = features.size(0), padded = tokens + padding_of(tokens);
    if (padded + 1 >= config_.axes_lens[0])
        fail(DIFFUSIONZ_E_ARGUMENT, "the prompt has ", tokens, " tokens; this model's position table ends at ",
             config_.axes_lens[0]);
    at::Tensor x = caption_embedder_(rms_norm(features, caption_norm_, config_.norm_eps), lora);
    x = at::cat({x, caption_pad_.expand({padded - tokens, config_.dim})}).unsqueeze(0);
    const at::Tensor rope = positions(kPatch, kPatch, padded).unified.narrow(0, kTokensMultiple, padded);
    return run_blocks(context_refiner_, "context_refiner", x, rope, nullptr, padded, lora, {});
}

Transformer::Positions Transformer::positions(int64_t latent_height, int64_t latent_width, int64_t caption_tokens) const {
    const int64_t rows = latent_height / kPatch, columns = latent_width / kPatch, tokens = rows * columns;
    const auto table = [&](const at::Tensor& frame, const at::Tensor& row, const at::Tensor& column) {
        return at::cat({axis_tables_[0].index_select(0, frame), axis_tables_[1].index_select(0, row),
                        axis_tables_[2].index_select(0, column)},
                       -1);
    };
    const auto i64 = at::TensorOptions().dtype(at::kLong);
    // The caption counts 1, 2, ... through its padding; the image is one frame after it; the image's padding sits at the origin.
    const at::Tensor index = at::arange(tokens, i64);
    const at::Tensor zeros = at::zeros({padding_of(tokens)}, i64);
    const at::Tensor image = table(at::cat({at::full({tokens}, caption_tokens + 1, i64), zeros}),
                                   at::cat({index.div(columns, "floor"), zeros}), at::cat({index.remainder(columns), zeros}));
    const at::Tensor none = at::zeros({caption_tokens}, i64);
    const at::Tensor caption = table(at::arange(1, caption_tokens + 1, i64), none, none);
    return {image.to(placement_.device), at::cat({image, caption}).to(placement_.device)};
}

at::Tensor Transformer::predict(const at::Tensor& latents, const Modulation& modulation, const at::Tensor& caption,
                                const Positions& positions, const LoraPairs* lora, const Watch& watch) const {
    const int64_t batch = latents.size(0), tokens = latents.size(2) / kPatch * (latents.size(3) / kPatch),
                  padding = padding_of(tokens);
    at::Tensor x = image_embedder_(patchify(latents, kPatch, placement_.dtype), lora);
    if (padding) x = at::cat({x, image_pad_.expand({batch, padding, config_.dim})}, 1);
    x = run_blocks(noise_refiner_, "noise_refiner", x, positions.image, &modulation, tokens + padding, lora, watch);
    // Only the image's tokens are read after the last layer.
    x = run_blocks(layers_, "layers", at::cat({x, caption}, 1), positions.unified, &modulation, tokens, lora, watch);
    return final_linear_(modulated_layer_norm(x, kFinalNormEps, modulation.final_scale.unsqueeze(1)), lora);
}

at::Tensor Transformer::forward(const at::Tensor& latents, float time, const at::Tensor& caption, const Positions& positions,
                                const LoraPairs* lora) const {
    return unpatchify(predict(latents, modulate({time}, lora), caption, positions, lora), kPatch, latents.size(2) / kPatch,
                      latents.size(3) / kPatch);
}

size_t Transformer::nbytes() const {
    size_t total = image_embedder_.nbytes() + caption_embedder_.nbytes() + time_mlp0_.nbytes() + time_mlp2_.nbytes() +
                   final_linear_.nbytes() + final_modulation_.nbytes() + modulation_.nbytes();
    for (const auto* blocks : {&noise_refiner_, &context_refiner_, &layers_}) {
        for (const Block& block : *blocks)
            total += block.qkv.nbytes() + block.out.nbytes() + block.w13.nbytes() + block.w2.nbytes();
    }
    return total;
}

}  // namespace diffusionz
