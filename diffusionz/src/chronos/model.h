// A loaded Chronos-2 model (Ansari et al. 2025): patch embedding, encoder layers of time attention, group attention and a
// feed-forward network, and the head. Immutable, shared by every engine that asks for the same files on the same device in the
// same precision.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "chronos/config.h"
#include "chronos/parameters.h"
#include "chronos/tokens.h"
#include "ops/invariant_linear.h"
#include "ops/series_tokens.h"

namespace diffusionz::chronos {

// output(relu(hidden(x))) + residual(x), with biases.
class ResidualBlock {
public:
    ResidualBlock(const Parameters& parameters, const std::string& name, int64_t in, int64_t hidden, int64_t out,
                  at::Device device);
    at::Tensor operator()(const at::Tensor& x) const;
    size_t nbytes() const { return hidden_.nbytes() + output_.nbytes() + residual_.nbytes(); }
    const InvariantLinear& hidden() const { return hidden_; }
    const InvariantLinear& output() const { return output_; }
    const InvariantLinear& residual() const { return residual_; }

private:
    InvariantLinear hidden_, output_, residual_;
};

class Model {
public:
    // placement.dtype is of the encoder's matrix products; everything else is float32.
    Model(const ModelFolders& folders, Placement placement);

    // The model already loaded in this process, or a new one. Files that changed on disk since make a new one. `lora` may be
    // empty.
    static std::shared_ptr<const Model> load(const std::filesystem::path& path, const std::filesystem::path& lora,
                                             Placement placement);

    // float32 [tokens, d_model] after the final norm; of the outputs alone, [rows * output_patches, d_model], unless `all`.
    // `watch`, when given, sees the hidden states after the embedding and after each layer.
    at::Tensor encode(const Tokens& tokens, bool all, const std::function<void(const at::Tensor&)>& watch = {}) const;
    // Scaled quantiles of hidden states: float32 [n, d_model] to [n, quantiles * patch], quantile-major.
    at::Tensor head(const at::Tensor& hidden) const { return output_embedding_(hidden); }

    // Whether rows that stand alone can be computed by forecast_rows: where products are the device's, not packed.
    bool computes_rows() const { return computes_rows_; }
    // The whole of a pass over rows that stand alone, all on the device: context float32 [rows, patches * patch], filled up with
    // NaN in front, future float32 [rows, output patches * patch], NaN where not known, to quantiles [rows, levels, output
    // patches * patch]. A missing patch is a token that no other attends to. A function of its inputs without waits: a CUDA graph
    // can hold it.
    at::Tensor forecast_rows(const at::Tensor& context, const at::Tensor& future) const;

    const ModelConfig& config() const { return config_; }
    const ModelFolders& folders() const { return folders_; }
    const Placement& placement() const { return placement_; }
    int64_t parameter_count() const { return parameters_.count(); }
    bool folds_single_groups() const { return folds_single_groups_; }
    size_t nbytes() const;
    // Bytes of activations that a pass holds for each token.
    int64_t token_nbytes() const;

private:
    struct Attention {
        InvariantLinear q, kv, o;
    };
    struct Layer {
        at::Tensor time_norm, group_norm, feed_forward_norm;
        at::Tensor time_qkv;  // [3 * inner, d_model], whose rows time.q and time.kv are; where rows are computed
        Attention time;
        InvariantLinear group_alone;  // Wo Wv: what group attention is for a group of one
        InvariantLinear wi, wo;
    };
    at::Tensor norm_weight(size_t layer, int sublayer) const;
    // `weight` times the weight of the norm before it, where forecast_rows needs it so; the norms of the layers are then ones.
    at::Tensor with_norm(const at::Tensor& weight, size_t layer, int sublayer) const;
    // `fused`, when given, gets queries', keys' and values' weights in one tensor, where rows are computed.
    Attention load_attention(size_t layer, int sublayer, at::Tensor* fused = nullptr) const;
    void prepare_rows();
    // The whole of group attention, packed when a group of several rows first comes.
    const std::vector<Attention>& group_attention() const;
    // Whether all of a layer's products can be those of FewRows.
    bool takes_few_rows(const Layer& layer) const;
    // Hidden states of the outputs, before the final norm: [rows * output_patches, d_model].
    at::Tensor encode_rows(const SeriesTokens& tokens, int64_t rows, int64_t output_patches) const;
    // x += attention over each group's rows.
    void attend_groups(size_t layer, at::Tensor& x, const GroupAttention& group) const;

    ModelFolders folders_;
    Placement placement_;
    ModelConfig config_;
    Parameters parameters_;
    ResidualBlock input_embedding_, output_embedding_;
    at::Tensor register_embedding_, final_norm_, cos_, sin_;
    // The patch embedding in the products' dtype, for the features of series_tokens; where rows are computed.
    at::Tensor embed_hidden_, embed_output_, embed_residual_;
    at::Tensor no_bias_, head_bias_;  // [d_ff], and the sum of the head's last two
    std::vector<Layer> layers_;
    bool folds_single_groups_, computes_rows_;
    mutable std::mutex group_mutex_;
    mutable std::vector<Attention> group_attention_;
};

}  // namespace diffusionz::chronos
