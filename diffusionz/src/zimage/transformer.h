// Z-Image's single-stream diffusion transformer (S3-DiT).
// Reference: diffusers' ZImageTransformer2DModel (basic mode), whose parameter names the checkpoint uses.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "core/json_file.h"
#include "core/weights.h"
#include "ops/linear.h"

namespace diffusionz {

struct TransformerConfig {
    int64_t in_channels = 16;
    int64_t dim = 3840;
    int64_t num_layers = 30;
    int64_t num_refiner_layers = 2;
    int64_t num_heads = 30;
    int64_t num_kv_heads = 30;
    int64_t caption_dim = 2560;
    double norm_eps = 1e-5;
    bool qk_norm = true;
    double rope_theta = 256.0;
    double t_scale = 1000.0;
    std::vector<int64_t> axes_dims = {32, 48, 48};
    std::vector<int64_t> axes_lens = {1536, 512, 512};

    int64_t head_dim() const { return dim / num_heads; }
    int64_t ffn_dim() const { return static_cast<int64_t>(static_cast<double>(dim) / 3 * 8); }  // as Python's int(dim / 3 * 8)

    static TransformerConfig from_json(const JsonFile& json);
    // From the tensors' shapes, with Z-Image's constants, for files that come without a config.
    static TransformerConfig from_shapes(const Checkpoint& checkpoint);
};

class Transformer {
public:
    static constexpr int64_t kPatch = 2;            // latent pixels a side of a token
    static constexpr int64_t kTokensMultiple = 32;  // captions and images are padded to it by learned tokens, which are attended

    Transformer(const TransformerConfig& config, const Weights& weights);

    // A caption after embedding, padding and its refiner: [1, padded tokens, dim]. It does not depend on the step, so once a
    // prompt is enough. features [tokens, caption_dim].
    at::Tensor refine_caption(const at::Tensor& features, const LoraPairs* lora) const;

    // Rotary tables of one image size beside one padded caption length; the same at every step.
    struct Positions {
        at::Tensor image;    // [padded image tokens, head_dim / 2] complex64
        at::Tensor unified;  // the image's rows, then the caption's
    };
    Positions positions(int64_t latent_height, int64_t latent_width, int64_t caption_tokens) const;

    // The model's output, before the pipeline negates it: float32 [batch, channels, height, width] like `latents`.
    // time = 1 - sigma; caption [batch, padded tokens, dim] from refine_caption.
    at::Tensor forward(const at::Tensor& latents, float time, const at::Tensor& caption, const Positions& positions,
                       const LoraPairs* lora) const;

    // A layer that an adapter can correct. Checkpoints name the parts of a fused product apart: such a name is rows of the
    // product.
    struct Target {
        const Linear* linear;
        int64_t row_begin, rows;
    };
    // Module names as diffusers has them (to_q...) and as the original has them (attention.qkv...).
    const std::vector<std::pair<std::string, Target>>& lora_targets() const { return lora_targets_; }

    const TransformerConfig& config() const { return config_; }
    size_t nbytes() const;

private:
    struct Block {
        Linear qkv, out, w13, w2;
        Linear modulation;  // empty in the context refiner
        at::Tensor attention_norm1, attention_norm2, ffn_norm1, ffn_norm2, q_norm, k_norm;
        bool modulated = false;
    };

    Block load_block(const Weights& weights, bool modulated) const;
    void add_lora_targets(const std::string& name, const Block& block);
    // x [batch, tokens, dim]; `time_features` [1, adaln] or undefined; only the first `keep` tokens of the result are computed.
    at::Tensor run_block(const Block& block, const at::Tensor& x, const at::Tensor& rope, const at::Tensor& time_features,
                         int64_t keep, const LoraPairs* lora) const;
    at::Tensor embed_time(float time, const LoraPairs* lora) const;

    TransformerConfig config_;
    Placement placement_;
    Linear image_embedder_, caption_embedder_, time_mlp0_, time_mlp2_, final_linear_, final_modulation_;
    at::Tensor caption_norm_, image_pad_, caption_pad_;
    std::vector<Block> noise_refiner_, context_refiner_, layers_;
    std::vector<at::Tensor> axis_tables_;  // an axis each: [positions, axis_dim / 2] complex64
    std::vector<std::pair<std::string, Target>> lora_targets_;
};

}  // namespace diffusionz
