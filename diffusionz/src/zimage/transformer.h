// Z-Image's single-stream diffusion transformer (S3-DiT).
// Reference: diffusers' ZImageTransformer2DModel (basic mode), whose parameter names the checkpoint uses.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <utility>
#include <vector>

#include "core/json_file.h"
#include "core/trace.h"
#include "core/weights.h"
#include "ops/activation.h"
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

    // What a step's time sets in every block. It depends on the schedule alone, so once a call is enough.
    struct Modulation {
        at::Tensor blocks;  // [times, blocks, 4, dim]: 1 + scale and tanh(gate) of attention, then of the feed-forward network
        at::Tensor final_scale;  // [times, dim]: 1 + scale
        Modulation at(int64_t time) const { return {blocks.narrow(0, time, 1), final_scale.narrow(0, time, 1)}; }
    };
    // times: 1 - sigma of each step.
    Modulation modulate(const std::vector<float>& times, const LoraPairs* lora) const;

    // The model's output at one time, before the pipeline negates it, as tokens [batch, image tokens, patch * patch * channels].
    // latents float32 [batch, channels, height, width]; caption [batch, padded tokens, dim] from refine_caption.
    // `watch`, when given, sees the residual stream [batch, tokens, dim] after each block.
    at::Tensor predict(const at::Tensor& latents, const Modulation& modulation, const at::Tensor& caption,
                       const Positions& positions, const LoraPairs* lora, const Watch& watch = {}) const;
    // The same as a picture: float32 like `latents`.
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
        at::Tensor attention_norm1, attention_norm2, ffn_norm1, ffn_norm2, q_norm, k_norm;
        int64_t modulation = -1;  // its place among the modulated blocks; none in the context refiner
    };
    // The numbers between two blocks: the residual stream, and what the next block's attention reads of it.
    struct Stream {
        at::Tensor x;  // [batch, tokens, dim]
        Activation normed;
    };
    // What one block multiplies by; undefined without modulation. Each [1, 1, dim].
    struct Factors {
        at::Tensor scale_attention, gate_attention, scale_ffn, gate_ffn;
    };

    Block load_block(const Weights& weights, Products products) const;
    void add_lora_targets(const std::string& name, const Block& block);
    static Factors factors_of(const Block& block, const Modulation* modulation);
    static Form form_for(const Linear& linear, const LoraPairs* lora);
    Stream enter(const Block& block, const at::Tensor& x, const Modulation* modulation, const LoraPairs* lora) const;
    // Only the first `keep` tokens of the result are computed. Its norm is `next`'s; without one it has none.
    Stream run_block(const Block& block, const Block* next, const Stream& in, const at::Tensor& rope,
                     const Modulation* modulation, int64_t keep, const LoraPairs* lora) const;
    // Enters the first block and runs all of them; `keep` is the last one's. `watch` calls them by `name`.
    at::Tensor run_blocks(const std::vector<Block>& blocks, const char* name, const at::Tensor& x, const at::Tensor& rope,
                          const Modulation* modulation, int64_t keep, const LoraPairs* lora, const Watch& watch) const;
    at::Tensor embed_times(const std::vector<float>& times, const LoraPairs* lora) const;

    TransformerConfig config_;
    Placement placement_;
    Linear image_embedder_, caption_embedder_, time_mlp0_, time_mlp2_, final_linear_, final_modulation_;
    Linear modulation_;  // of all modulated blocks: one product a call
    at::Tensor caption_norm_, image_pad_, caption_pad_;
    std::vector<Block> noise_refiner_, context_refiner_, layers_;
    std::vector<at::Tensor> axis_tables_;  // an axis each: [positions, axis_dim / 2] complex64
    std::vector<std::pair<std::string, Target>> lora_targets_;
};

}  // namespace diffusionz
