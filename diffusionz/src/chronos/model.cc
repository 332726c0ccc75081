#include "chronos/model.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "core/error.h"
#include "core/model_cache.h"
#include "ops/disabled.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"

namespace diffusionz::chronos {
namespace {

std::string layer_name(size_t layer, int sublayer) { return concat("encoder.block.", layer, ".layer.", sublayer, "."); }

}  // namespace

ResidualBlock::ResidualBlock(const Parameters& parameters, const std::string& name, int64_t in, int64_t hidden, int64_t out,
                             at::Device device) {
    const auto linear = [&](const std::string& part, int64_t from, int64_t to) {
        return InvariantLinear(parameters.get(name + "." + part + ".weight", {to, from}),
                               parameters.get(name + "." + part + ".bias", {to}), {device, at::kFloat});
    };
    hidden_ = linear("hidden_layer", in, hidden);
    output_ = linear("output_layer", hidden, out);
    residual_ = linear("residual_layer", in, out);
}

at::Tensor ResidualBlock::operator()(const at::Tensor& x) const {
    at::Tensor y = output_(hidden_.relu(x));
    residual_.add_to(y, x);
    return y;
}

Model::Model(const ModelFolders& folders, Placement placement)
    : folders_(folders),
      placement_(placement),
      config_(read_config(folders.model)),
      parameters_(folders),
      input_embedding_(parameters_, "input_patch_embedding", 3 * config_.patch, config_.d_ff, config_.d_model, placement.device),
      output_embedding_(parameters_, "output_patch_embedding", config_.d_model, config_.d_ff,
                        static_cast<int64_t>(config_.quantiles.size()) * config_.patch, placement.device),
      folds_single_groups_(!kernel_disabled("fold_group_attention")) {
    const auto vector = [&](const at::Tensor& weight) {
        return weight.to(placement.device, /*non_blocking=*/false, /*copy=*/true);
    };
    if (config_.register_token)
        register_embedding_ = vector(parameters_.get("shared.weight", {2, config_.d_model}).slice(0, 1, 2));
    final_norm_ = vector(parameters_.get("encoder.final_layer_norm.weight", {config_.d_model}));
    for (size_t i = 0; i < static_cast<size_t>(config_.layers); ++i) {
        const auto norm = [&](int sublayer) {
            return vector(parameters_.get(layer_name(i, sublayer) + "layer_norm.weight", {config_.d_model}));
        };
        Layer layer;
        layer.time_norm = norm(0), layer.group_norm = norm(1), layer.feed_forward_norm = norm(2);
        layer.time = load_attention(layer_name(i, 0));
        // In float64, so that folding costs no accuracy.
        const std::string group = layer_name(i, 1) + "self_attention.";
        const at::Tensor value = parameters_.get(group + "v.weight", {config_.inner(), config_.d_model}),
                         out = parameters_.get(group + "o.weight", {config_.d_model, config_.inner()});
        for (const char* part : {"q", "k"}) parameters_.get(group + part + ".weight", {config_.inner(), config_.d_model});
        if (folds_single_groups_)
            layer.group_alone = InvariantLinear(at::mm(out.to(at::kDouble), value.to(at::kDouble)).to(at::kFloat), {}, placement);
        layer.wi =
            InvariantLinear(parameters_.get(layer_name(i, 2) + "mlp.wi.weight", {config_.d_ff, config_.d_model}), {}, placement);
        layer.wo =
            InvariantLinear(parameters_.get(layer_name(i, 2) + "mlp.wo.weight", {config_.d_model, config_.d_ff}), {}, placement);
        layers_.push_back(std::move(layer));
        parameters_.release_pages();
    }

    const int64_t positions = token_count_max(config_, config_.context_length, config_.max_output_patches);
    const auto f32 = at::TensorOptions().dtype(at::kFloat);
    const at::Tensor exponents = at::arange(0, config_.d_kv, 2, f32) / static_cast<double>(config_.d_kv);
    const at::Tensor frequencies = at::pow(at::scalar_tensor(config_.rope_theta, f32), exponents).reciprocal();
    const at::Tensor angles = at::outer(at::arange(positions, f32), frequencies);
    cos_ = angles.cos().to(placement.device);
    sin_ = angles.sin().to(placement.device);
}

std::shared_ptr<const Model> Model::load(const std::filesystem::path& path, const std::filesystem::path& lora,
                                         Placement placement) {
    static ModelCache<Model> cache;
    const ModelFolders folders = find_folders(path, lora);
    std::string key = model_key(folders.model, placement);
    if (!folders.lora.empty()) key += model_key(folders.lora, placement);
    return cache.get(key, [&] { return std::make_shared<const Model>(folders, placement); });
}

Model::Attention Model::load_attention(const std::string& name) const {
    const int64_t inner = config_.inner(), width = config_.d_model;
    const auto get = [&](const char* part, int64_t out, int64_t in) {
        return parameters_.get(name + "self_attention." + part + ".weight", {out, in});
    };
    return {InvariantLinear(get("q", inner, width), {}, placement_),
            InvariantLinear(at::cat({get("k", inner, width), get("v", inner, width)}), {}, placement_),
            InvariantLinear(get("o", width, inner), {}, placement_)};
}

const std::vector<Model::Attention>& Model::group_attention() const {
    const std::lock_guard lock(group_mutex_);
    if (group_attention_.empty()) {
        std::vector<Attention> loaded;
        for (size_t i = 0; i < layers_.size(); ++i) loaded.push_back(load_attention(layer_name(i, 1)));
        parameters_.release_pages();
        group_attention_ = std::move(loaded);
    }
    return group_attention_;
}

void Model::attend_groups(size_t layer, at::Tensor& x, const GroupAttention& group) const {
    const int64_t alone = x.size(0) - group.shared_count;
    if (alone > 0) {
        at::Tensor rest = x.narrow(0, group.shared_count, alone);
        layers_[layer].group_alone.add_to(rest, rms_norm(rest, layers_[layer].group_norm, config_.norm_epsilon));
    }
    if (group.shared_count == 0) return;
    const Attention& attention = group_attention()[layer];
    const at::Tensor order = group.order.to(x.device());
    const at::Tensor normed = rms_norm(x.index_select(0, order), layers_[layer].group_norm, config_.norm_epsilon);
    const at::Tensor kv = attention.kv(normed);
    const at::Tensor mixed =
        segment_attention(attention.q(normed), kv.narrow(1, 0, config_.inner()), kv.narrow(1, config_.inner(), config_.inner()),
                          config_.heads, group.segments, placement_.dtype);
    x.index_add_(0, order, attention.o(mixed));
}

at::Tensor Model::encode(const Tokens& tokens, bool all, const std::function<void(const at::Tensor&)>& watch) const {
    const at::Device device = placement_.device;
    const int64_t inner = config_.inner();
    at::Tensor x = input_embedding_(tokens.features.to(device));
    if (config_.register_token)
        x.index_copy_(0, tokens.registers.to(device), register_embedding_.expand({tokens.registers.size(0), -1}));
    if (watch) watch(x);
    const at::Tensor positions = tokens.positions.to(device);
    const auto rotate = [&](const at::Tensor& part, const at::Tensor& at_positions) {
        rope_halves_at(part.unflatten(1, {config_.heads, config_.d_kv}), cos_, sin_, at_positions);
    };
    for (size_t i = 0; i < layers_.size(); ++i) {
        const Layer& layer = layers_[i];
        // After the last layer only the outputs are read: their queries attend to every token, and the rest of the layer is
        // theirs alone.
        const bool outputs_only = !all && i + 1 == layers_.size();
        at::Tensor normed = rms_norm(x, layer.time_norm, config_.norm_epsilon);
        const at::Tensor kv = layer.time.kv(normed), k = kv.narrow(1, 0, inner), v = kv.narrow(1, inner, inner);
        rotate(k, positions);
        if (outputs_only) {
            const at::Tensor outputs = tokens.outputs.to(device);
            normed = normed.index_select(0, outputs);
            x = x.index_select(0, outputs);
        }
        const at::Tensor q = layer.time.q(normed);
        rotate(q, outputs_only ? tokens.output_positions.to(device) : positions);
        const at::Tensor mixed =
            segment_attention(q, k, v, config_.heads, outputs_only ? tokens.output_time : tokens.time, placement_.dtype);
        layer.time.o.add_to(x, mixed);
        attend_groups(i, x, outputs_only ? tokens.output_group : tokens.group);
        layer.wo.add_to(x, layer.wi.relu(rms_norm(x, layer.feed_forward_norm, config_.norm_epsilon)));
        if (watch) watch(x);
    }
    return rms_norm(x, final_norm_, config_.norm_epsilon);
}

size_t Model::nbytes() const {
    size_t total = input_embedding_.nbytes() + output_embedding_.nbytes();
    for (const Layer& layer : layers_) {
        total += layer.time.q.nbytes() + layer.time.kv.nbytes() + layer.time.o.nbytes() + layer.group_alone.nbytes() +
                 layer.wi.nbytes() + layer.wo.nbytes();
    }
    const std::lock_guard lock(group_mutex_);
    for (const Attention& attention : group_attention_)
        total += attention.q.nbytes() + attention.kv.nbytes() + attention.o.nbytes();
    return total;
}

int64_t Model::token_nbytes() const {
    // The residual stream and its normalised copy; then queries, keys, values and what they mix, or the feed-forward network's
    // middle.
    const int64_t floats =
        2 * config_.d_model + std::max(4 * config_.inner() + 2 * config_.d_model, config_.d_ff) + 3 * config_.patch;
    return floats * static_cast<int64_t>(sizeof(float));
}

}  // namespace diffusionz::chronos
