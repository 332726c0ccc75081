#include "chronos/model.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <iterator>

#include "core/error.h"
#include "core/model_cache.h"
#include "ops/disabled.h"
#include "ops/few_rows_linear.h"
#include "ops/residual_norm.h"
#include "ops/rms_norm.h"
#include "ops/rope.h"
#include "ops/row_attention.h"
#include "ops/series_quantiles.h"

namespace diffusionz::chronos {
namespace {

// So many tokens of all rows make a pass that latency bounds: products, norms and sums are then fewer launches (ops/few_rows_linear.h).
constexpr int64_t kFewTokens = 128;

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
      folds_single_groups_(!kernel_disabled("fold_group_attention")),
      // On the CPU only where it is asked for: there the packed products of encode are faster, and the same for a row in any
      // company.
      computes_rows_(folds_single_groups_ &&
                     (placement.device.is_cuda() || (placement.dtype == at::kFloat && !input_embedding_.hidden().packed()))) {
    const auto vector = [&](const at::Tensor& weight) {
        return weight.to(placement.device, /*non_blocking=*/false, /*copy=*/true);
    };
    if (config_.register_token)
        register_embedding_ = vector(parameters_.get("shared.weight", {2, config_.d_model}).slice(0, 1, 2));
    final_norm_ = vector(parameters_.get("encoder.final_layer_norm.weight", {config_.d_model}));
    for (size_t i = 0; i < static_cast<size_t>(config_.layers); ++i) {
        const auto norm = [&](int sublayer) {
            const at::Tensor weight = norm_weight(i, sublayer);
            return vector(computes_rows_ ? at::ones_like(weight) : weight);
        };
        Layer layer;
        layer.time_norm = norm(0), layer.group_norm = norm(1), layer.feed_forward_norm = norm(2);
        layer.time = load_attention(i, 0, &layer.time_qkv);
        // In float64, so that folding costs no accuracy.
        const std::string group = layer_name(i, 1) + "self_attention.";
        const at::Tensor value = parameters_.get(group + "v.weight", {config_.inner(), config_.d_model}),
                         out = parameters_.get(group + "o.weight", {config_.d_model, config_.inner()});
        // Read only when a group of several rows comes; of the right shape from the start.
        for (const char* part : {"q", "k"}) parameters_.get(group + part + ".weight", {config_.inner(), config_.d_model});
        if (folds_single_groups_) {
            const at::Tensor product = at::mm(out.to(at::kDouble), value.to(at::kDouble));
            layer.group_alone = InvariantLinear(with_norm(product, i, 1).to(at::kFloat), {}, placement);
        }
        const at::Tensor wi = parameters_.get(layer_name(i, 2) + "mlp.wi.weight", {config_.d_ff, config_.d_model});
        layer.wi = InvariantLinear(with_norm(wi, i, 2), {}, placement);
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
    prepare_rows();
}

void Model::prepare_rows() {
    if (!computes_rows_) return;
    const auto get = [&](const char* name, const std::vector<int64_t>& shape) {
        return parameters_.get(concat("input_patch_embedding.", name), shape);
    };
    const auto place = [&](const at::Tensor& x) {
        return x.to(at::TensorOptions().device(placement_.device).dtype(placement_.dtype));
    };
    const int64_t width = config_.d_model, in = 3 * config_.patch;
    const at::Tensor register_embedding =
        config_.register_token ? parameters_.get("shared.weight", {2, width}).select(0, 1) : at::Tensor();
    embed_hidden_ = place(series_weight(get("hidden_layer.weight", {config_.d_ff, in}), get("hidden_layer.bias", {config_.d_ff}),
                                        {}, placement_.dtype));
    embed_residual_ = place(series_weight(get("residual_layer.weight", {width, in}),
                                          get("residual_layer.bias", {width}) + get("output_layer.bias", {width}),
                                          register_embedding, placement_.dtype));
    embed_output_ = place(get("output_layer.weight", {width, config_.d_ff}));
    no_bias_ = at::zeros({config_.d_ff}, embed_output_.options());
    head_bias_ = output_embedding_.output().bias() + output_embedding_.residual().bias();
}

std::shared_ptr<const Model> Model::load(const std::filesystem::path& path, const std::filesystem::path& lora,
                                         Placement placement) {
    static ModelCache<Model> cache;
    const ModelFolders folders = find_folders(path, lora);
    std::string key = model_key(folders.model, placement);
    if (!folders.lora.empty()) key += model_key(folders.lora, placement);
    return cache.get(key, [&] { return std::make_shared<const Model>(folders, placement); });
}

at::Tensor Model::norm_weight(size_t layer, int sublayer) const {
    return parameters_.get(layer_name(layer, sublayer) + "layer_norm.weight", {config_.d_model});
}

at::Tensor Model::with_norm(const at::Tensor& weight, size_t layer, int sublayer) const {
    return computes_rows_ ? weight * norm_weight(layer, sublayer) : weight;
}

Model::Attention Model::load_attention(size_t layer, int sublayer, at::Tensor* fused) const {
    const int64_t inner = config_.inner(), width = config_.d_model;
    const auto get = [&](const char* part, int64_t out, int64_t in) {
        return parameters_.get(concat(layer_name(layer, sublayer), "self_attention.", part, ".weight"), {out, in});
    };
    at::Tensor q = with_norm(get("q", inner, width), layer, sublayer),
               kv = with_norm(at::cat({get("k", inner, width), get("v", inner, width)}), layer, sublayer);
    if (fused && computes_rows_) {
        *fused = at::cat({q, kv}).to(at::TensorOptions().device(placement_.device).dtype(placement_.dtype));
        q = fused->narrow(0, 0, inner), kv = fused->narrow(0, inner, 2 * inner);
    }
    return {InvariantLinear(q, {}, placement_), InvariantLinear(kv, {}, placement_),
            InvariantLinear(get("o", width, inner), {}, placement_)};
}

const std::vector<Model::Attention>& Model::group_attention() const {
    const std::lock_guard lock(group_mutex_);
    if (group_attention_.empty()) {
        std::vector<Attention> loaded;
        for (size_t i = 0; i < layers_.size(); ++i) loaded.push_back(load_attention(i, 1));
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

namespace {

// max(x W^T, 0) in x's dtype; in 16 bits one launch.
at::Tensor relu_product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& no_bias) {
    if (x.scalar_type() == at::kFloat) return at::mm(x, weight.t()).relu_();
    return at::_addmm_activation(no_bias, x, weight.t());
}

// sum += x W^T, sums of 16-bit products in float32.
void add_product(at::Tensor& sum, const at::Tensor& x, const at::Tensor& weight) {
    if (x.scalar_type() == at::kFloat) {
        sum.addmm_(x, weight.t());
    } else {
        at::addmm_out(sum, sum, x, weight.t(), at::kFloat);
    }
}

at::Tensor float_product(const at::Tensor& x, const at::Tensor& weight) {
    return x.scalar_type() == at::kFloat ? at::mm(x, weight.t()) : at::mm(x, weight.t(), at::kFloat);
}

// The last `count` tokens of each row: x [rows * tokens, width] to [rows, count, width].
at::Tensor last_tokens(const at::Tensor& x, int64_t rows, int64_t count) {
    const at::Tensor by_row = x.unflatten(0, {rows, -1});
    return by_row.narrow(1, by_row.size(1) - count, count);
}

}  // namespace

bool Model::takes_few_rows(const Layer& layer) const {
    if (config_.d_model > FewRows::kWidthMax) return false;
    const at::Tensor* weights[] = {&layer.time_qkv, &layer.time.o.weight(), &layer.group_alone.weight(), &layer.wi.weight(),
                                   &layer.wo.weight()};
    return std::all_of(std::begin(weights), std::end(weights), [](const at::Tensor* weight) { return FewRows::takes(*weight); });
}

at::Tensor Model::encode_rows(const SeriesTokens& tokens, int64_t rows, int64_t output_patches) const {
    const int64_t inner = config_.inner();
    const auto norm = [&](const at::Tensor& x, const at::Tensor& a, const at::Tensor& b) {
        return residual_norm(x, a, b, /*keep=*/b.defined(), config_.norm_epsilon, placement_.dtype);
    };
    at::Tensor x = float_product(tokens.features, embed_residual_);
    const at::Tensor embedded = relu_product(tokens.features, embed_hidden_, no_bias_);
    if (x.size(0) <= kFewTokens && takes_few_rows(layers_.front())) {
        FewRows stream(x, config_.norm_epsilon, placement_.dtype);
        stream.add(embedded, embed_output_);
        for (const Layer& layer : layers_) {
            const auto parts = stream.product(layer.time_qkv).unflatten(0, {rows, -1}).chunk(3, 2);
            const at::Tensor mixed = row_attention(parts[0], parts[1], parts[2], config_.heads, tokens.valid, cos_, sin_);
            stream.add(mixed.flatten(0, 1), layer.time.o.weight());
            stream.add_own(layer.group_alone.weight());
            stream.add(stream.product(layer.wi.weight(), /*relu=*/true), layer.wo.weight());
        }
        return last_tokens(stream.numbers(), rows, output_patches).reshape({-1, config_.d_model});
    }
    add_product(x, embedded, embed_output_);
    for (size_t i = 0; i < layers_.size(); ++i) {
        const Layer& layer = layers_[i];
        const at::Tensor normed = norm(x, {}, {});
        at::Tensor q, k, v;  // [rows, tokens, inner]
        if (i + 1 < layers_.size()) {
            const auto parts = at::mm(normed, layer.time_qkv.t()).unflatten(0, {rows, -1}).chunk(3, 2);
            q = parts[0], k = parts[1], v = parts[2];
        } else {
            // After the last layer only the outputs are read.
            const auto parts = at::mm(normed, layer.time.kv.weight().t()).unflatten(0, {rows, -1}).chunk(2, 2);
            k = parts[0], v = parts[1];
            const at::Tensor outputs = last_tokens(normed, rows, output_patches).reshape({-1, config_.d_model});
            q = at::mm(outputs, layer.time.q.weight().t()).unflatten(0, {rows, -1});
            x = last_tokens(x, rows, output_patches).reshape({-1, config_.d_model});
        }
        const at::Tensor mixed = row_attention(q, k, v, config_.heads, tokens.valid, cos_, sin_).reshape({-1, inner});
        // Two sums that are read once each before the stream is written again.
        const at::Tensor over_time = at::mm(mixed, layer.time.o.weight().t());
        const at::Tensor over_group = at::mm(norm(x, over_time, {}), layer.group_alone.weight().t());
        add_product(x, relu_product(norm(x, over_time, over_group), layer.wi.weight(), no_bias_), layer.wo.weight());
    }
    return x;
}

at::Tensor Model::forecast_rows(const at::Tensor& context, const at::Tensor& future) const {
    const int64_t rows = context.size(0), output_patches = future.size(1) / config_.patch;
    const SeriesTokens tokens = series_tokens(
        {config_.patch, config_.register_token, config_.arcsinh, config_.time_encoding_scale}, context, future, placement_.dtype);
    const at::Tensor hidden = rms_norm(encode_rows(tokens, rows, output_patches), final_norm_, config_.norm_epsilon);
    const InvariantLinear &up = output_embedding_.hidden(), &down = output_embedding_.output(),
                          &direct = output_embedding_.residual();
    at::Tensor z = at::addmm(head_bias_, hidden, direct.weight().t());
    z.addmm_(at::_addmm_activation(up.bias(), hidden, up.weight().t()), down.weight().t());
    return series_quantiles(z.view({rows, output_patches, -1, config_.patch}), tokens.loc, tokens.scale, config_.arcsinh);
}

size_t Model::nbytes() const {
    size_t total = input_embedding_.nbytes() + output_embedding_.nbytes();
    for (const at::Tensor& weight : {embed_hidden_, embed_output_, embed_residual_})
        total += weight.defined() ? weight.nbytes() : 0;
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
