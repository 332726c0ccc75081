// Qwen3 as Z-Image's text encoder: token ids to the hidden states before the last layer.
// Reference: transformers' Qwen3Model, `hidden_states[-2]`, causal, without padding.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "core/json_file.h"
#include "core/weights.h"
#include "ops/linear.h"

namespace diffusionz {

struct TextEncoderConfig {
    int64_t hidden_size = 2560;
    int64_t num_layers = 36;
    int64_t num_heads = 32;
    int64_t num_kv_heads = 8;
    int64_t head_dim = 128;
    int64_t intermediate_size = 9728;
    int64_t vocab_size = 151936;
    double rms_norm_eps = 1e-6;
    double rope_theta = 1e6;
    bool attention_bias = false;

    static TextEncoderConfig from_json(const JsonFile& json);
    // From the tensors' shapes, with Qwen3's constants, for files that come without a config.
    static TextEncoderConfig from_shapes(const Checkpoint& checkpoint);
};

class TextEncoder {
public:
    static constexpr int64_t kTokensMax = 512;      // as the reference cuts a prompt
    static constexpr int64_t kTokensMultiple = 32;  // on CUDA a prompt is padded to it, so that few graphs serve all lengths

    // `streamed`: the layers stay where `weights` has them, and each comes to the device when forward() is at it.
    TextEncoder(const TextEncoderConfig& config, const Weights& weights, bool streamed = false);

    // Features [tokens, hidden_size] of at most kTokensMax `ids`, on the model's device.
    at::Tensor encode(const std::vector<int32_t>& ids) const;
    // The two halves of encode(): the embeddings [padded tokens, hidden_size] on the host, in the model's precision, zeros as
    // padding (attention is causal, so what stands right of a token does not change it); and the layers, on the device.
    at::Tensor embed(const std::vector<int32_t>& ids) const;
    at::Tensor forward(const at::Tensor& embedded) const;

    const TextEncoderConfig& config() const { return config_; }
    // Of what is on the device all the time.
    size_t nbytes() const;

private:
    struct Layer {
        Linear qkv, out, gate_up, down;
    };
    struct Norms {
        at::Tensor input, post_attention, q, k;
    };

    Layer load_layer(const Weights& weights, size_t i) const;

    TextEncoderConfig config_;
    Placement placement_;
    at::Tensor embedding_;       // [vocab, hidden], on the host as stored: only a prompt's rows are ever needed on the device
    std::vector<Norms> norms_;   // of all layers but the last, whose output Z-Image does not use
    std::vector<Layer> layers_;  // their products; none when they are streamed
    std::optional<Weights> streamed_;
    at::Tensor rope_;  // [kTokensMax, head_dim / 2] complex64
};

}  // namespace diffusionz
