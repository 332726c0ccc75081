#include "zimage/text_encoder.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "core/error.h"
#include "ops/attention.h"
#include "ops/gated_linear.h"
#include "ops/modulated_norm.h"
#include "ops/qk_norm_rope.h"

namespace diffusionz {
namespace {

// Fails with E_MODEL.
void check_heads(const TextEncoderConfig& config, const std::string& name) {
    if (config.num_heads < 1 || config.num_kv_heads < 1 || config.num_heads % config.num_kv_heads != 0 ||
        config.head_dim % 2 != 0) {
        fail(DIFFUSIONZ_E_MODEL, name, ": ", config.num_heads, " heads, ", config.num_kv_heads, " key-value heads and head_dim ",
             config.head_dim, " do not fit together");
    }
}

}  // namespace

TextEncoderConfig TextEncoderConfig::from_json(const JsonFile& json) {
    const std::string type = json.text("model_type", "qwen3");
    if (type != "qwen3") fail(DIFFUSIONZ_E_MODEL, json.name(), ": model_type is '", type, "'; Z-Image's text encoder is qwen3");
    TextEncoderConfig config;
    config.hidden_size = json.integer("hidden_size", config.hidden_size, 1, 1 << 16);
    config.num_layers = json.integer("num_hidden_layers", config.num_layers, 1, 1024);
    config.num_heads = json.integer("num_attention_heads", config.num_heads, 1, 1024);
    config.num_kv_heads = json.integer("num_key_value_heads", config.num_heads, 1, 1024);
    config.head_dim = json.integer("head_dim", config.hidden_size / config.num_heads, 2, 1024);
    config.intermediate_size = json.integer("intermediate_size", config.intermediate_size, 1, 1 << 20);
    config.vocab_size = json.integer("vocab_size", config.vocab_size, 1, 1 << 24);
    config.rms_norm_eps = json.number("rms_norm_eps", config.rms_norm_eps, 0, 1);
    config.attention_bias = json.boolean("attention_bias", false);
    // transformers 5 nests the rotary parameters, earlier versions do not.
    const JsonFile rope = json.child("rope_parameters");
    config.rope_theta = rope.number("rope_theta", json.number("rope_theta", 1e4, 1, 1e12), 1, 1e12);
    const std::string rope_type = rope.text("rope_type", "default");
    if (rope_type != "default" || !json.child("rope_scaling").object().empty()) {
        fail(DIFFUSIONZ_E_MODEL, json.name(), ": rotary embeddings of type '", rope_type,
             "' or with rope_scaling are not supported; allowed is 'default'");
    }
    if (json.boolean("use_sliding_window", false)) fail(DIFFUSIONZ_E_MODEL, json.name(), ": use_sliding_window is not supported");
    const std::string activation = json.text("hidden_act", "silu");
    if (activation != "silu") fail(DIFFUSIONZ_E_MODEL, json.name(), ": hidden_act is '", activation, "'; it must be silu");
    check_heads(config, json.name());
    return config;
}

TextEncoderConfig TextEncoderConfig::from_shapes(const Checkpoint& checkpoint) {
    TextEncoderConfig config;
    const std::string first = "layers.0.self_attn.";
    config.vocab_size = checkpoint.extent("embed_tokens.weight", 0);
    config.hidden_size = checkpoint.extent("embed_tokens.weight", 1);
    config.head_dim = checkpoint.extent(first + "q_norm.weight", 0);
    config.num_heads = checkpoint.extent(first + "q_proj.weight", 0) / config.head_dim;
    config.num_kv_heads = checkpoint.extent(first + "k_proj.weight", 0) / config.head_dim;
    config.intermediate_size = checkpoint.extent("layers.0.mlp.gate_proj.weight", 0);
    config.attention_bias = checkpoint.has(first + "q_proj.bias");
    config.num_layers = 0;
    while (checkpoint.has_below(concat("layers.", config.num_layers, '.'))) ++config.num_layers;
    check_heads(config, checkpoint.name());
    return config;
}

TextEncoder::TextEncoder(const TextEncoderConfig& config, const Weights& weights, bool streamed)
    : config_(config), placement_(weights.placement()) {
    const int64_t width = config.hidden_size, d = config.head_dim;
    embedding_ = weights.get_on_host("embed_tokens.weight", {config.vocab_size, width});
    for (int64_t i = 0; i + 1 < config.num_layers; ++i) {
        const Weights layer = weights.below(concat("layers.", i, "."));
        norms_.push_back({layer.get("input_layernorm.weight", {width}), layer.get("post_attention_layernorm.weight", {width}),
                          layer.get("self_attn.q_norm.weight", {d}), layer.get("self_attn.k_norm.weight", {d})});
        // Loaded even where it is not kept: a damaged file should be known now.
        Layer products = load_layer(weights, static_cast<size_t>(i));
        if (!streamed) layers_.push_back(std::move(products));
        weights.checkpoint().release_pages();
    }
    if (streamed) streamed_ = weights;
    const auto f32 = at::TensorOptions().dtype(at::kFloat);
    const at::Tensor inverse_frequencies = at::reciprocal(at::pow(config.rope_theta, at::arange(0, d, 2, f32) / d));
    const at::Tensor angles = at::outer(at::arange(kTokensMax, f32), inverse_frequencies);
    rope_ = at::complex(angles.cos(), angles.sin()).to(placement_.device);
}

TextEncoder::Layer TextEncoder::load_layer(const Weights& weights, size_t i) const {
    const int64_t width = config_.hidden_size, d = config_.head_dim, ffn = config_.intermediate_size;
    const int64_t heads = config_.num_heads, kv_heads = config_.num_kv_heads;
    const Weights layer = weights.below(concat("layers.", i, "."));
    const Weights attention = layer.below("self_attn.");
    at::Tensor qkv_bias, out_bias;
    if (config_.attention_bias) {
        qkv_bias =
            attention.get_fused({"q_proj.bias", "k_proj.bias", "v_proj.bias"}, {{heads * d}, {kv_heads * d}, {kv_heads * d}});
        out_bias = attention.get("o_proj.bias", {width});
    }
    return {
        Linear(attention.get_fused({"q_proj.weight", "k_proj.weight", "v_proj.weight"},
                                   {{heads * d, width}, {kv_heads * d, width}, {kv_heads * d, width}}),
               qkv_bias),
        Linear(attention.get("o_proj.weight", {width, heads * d}), out_bias),
        Linear(layer.get_fused({"mlp.gate_proj.weight", "mlp.up_proj.weight"}, {{ffn, width}, {ffn, width}})),
        Linear(layer.get("mlp.down_proj.weight", {width, ffn})),
    };
}

at::Tensor TextEncoder::embed(const std::vector<int32_t>& ids) const {
    for (const int32_t id : ids) {
        if (id < 0 || id >= config_.vocab_size) {
            fail(DIFFUSIONZ_E_MODEL, "the tokenizer gives id ", id, ", the text encoder has ", config_.vocab_size,
                 " embeddings: they belong to different models");
        }
    }
    const auto tokens = static_cast<int64_t>(ids.size());
    const at::Tensor rows = embedding_.index_select(0, at::tensor(ids, at::kInt)).to(placement_.dtype);
    if (placement_.device.is_cpu()) return rows;
    const int64_t padded = (tokens + kTokensMultiple - 1) / kTokensMultiple * kTokensMultiple;
    return at::constant_pad_nd(rows, {0, 0, 0, padded - tokens});
}

at::Tensor TextEncoder::forward(const at::Tensor& embedded) const {
    const int64_t d = config_.head_dim, heads = config_.num_heads, kv_heads = config_.num_kv_heads;
    const double eps = config_.rms_norm_eps;
    const at::Tensor rope = rope_.narrow(0, 0, embedded.size(0));
    if (norms_.empty()) return embedded;
    at::Tensor x = embedded.unsqueeze(0);
    Activation normed = modulated_norm(x, norms_.front().input, eps, {});
    for (size_t i = 0; i < norms_.size(); ++i) {
        const Norms& norms = norms_[i];
        std::optional<Layer> fetched;
        if (streamed_) fetched = load_layer(*streamed_, i);
        const Layer& layer = fetched ? *fetched : layers_[i];
        const auto qkv = qk_norm_rope(layer.qkv(normed), norms.q, norms.k, eps, rope, heads, kv_heads, RopePairs::halves)
                             .split_with_sizes({heads * d, kv_heads * d, kv_heads * d}, -1);
        const at::Tensor attended = attention(qkv[0].unflatten(-1, {heads, d}), qkv[1].unflatten(-1, {kv_heads, d}),
                                              qkv[2].unflatten(-1, {kv_heads, d}), /*causal=*/true);
        Residual residual = gated_residual(x, layer.out(attended), {}, eps, {}, norms.post_attention, {});
        const Activation gated = gated_linear(layer.gate_up, residual.normed, nullptr, Form::plain);
        const at::Tensor next_norm = i + 1 < norms_.size() ? norms_[i + 1].input : at::Tensor();
        residual = gated_residual(residual.sum, layer.down(gated), {}, eps, {}, next_norm, {});
        x = residual.sum;
        normed = residual.normed;
    }
    return x.squeeze(0);
}

at::Tensor TextEncoder::encode(const std::vector<int32_t>& ids) const {
    return forward(embed(ids).to(placement_.device)).narrow(0, 0, static_cast<int64_t>(ids.size()));
}

size_t TextEncoder::nbytes() const {
    size_t total = placement_.device.is_cpu() ? embedding_.nbytes() : 0;
    for (const Layer& layer : layers_)
        total += layer.qkv.nbytes() + layer.out.nbytes() + layer.gate_up.nbytes() + layer.down.nbytes();
    return total;
}

}  // namespace diffusionz
