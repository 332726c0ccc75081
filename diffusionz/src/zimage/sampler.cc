#include "zimage/sampler.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <utility>

#include "core/error.h"
#include "ops/patchify.h"

namespace diffusionz {
namespace {

constexpr size_t kPositionsMax = 32;  // tables of a few megabytes

}  // namespace

Transformer::Positions Sampler::positions(const at::Tensor& latents, const at::Tensor& caption) {
    const auto key = std::make_tuple(latents.size(2), latents.size(3), caption.size(1));
    auto found = positions_.find(key);
    if (found == positions_.end() && positions_.size() == kPositionsMax) positions_.erase(positions_.begin());
    if (found == positions_.end())
        found = positions_.emplace(key, transformer_.positions(latents.size(2), latents.size(3), caption.size(1))).first;
    return found->second;
}

GraphCache::Function Sampler::step(const Transformer::Positions& positive, const Transformer::Positions& negative, bool guided,
                                   const Guidance& guidance, const Lora& lora) {
    constexpr int64_t kPatch = Transformer::kPatch;
    return [this, positive, negative, guided, guidance, pairs = lora.pairs](const std::vector<at::Tensor>& inputs) {
        const at::Tensor &latents = inputs[0], &delta = inputs[3], &caption = inputs[4];
        const Transformer::Modulation modulation{inputs[1], inputs[2]};
        at::Tensor with, without;
        if (guided && inputs[5].size(1) == caption.size(1)) {
            const at::Tensor both =
                transformer_.predict(latents.expand({2, -1, -1, -1}), modulation, at::cat({caption, inputs[5]}), positive, pairs,
                                     std::exchange(trace_, {}));
            with = both.narrow(0, 0, 1), without = both.narrow(0, 1, 1);
        } else {
            with = transformer_.predict(latents, modulation, caption, positive, pairs, std::exchange(trace_, {}));
            if (guided) without = transformer_.predict(latents, modulation, inputs[5], negative, pairs);
        }
        at::Tensor next = latents.clone();
        if (!guided || guidance.normalization <= 0) {
            euler_step(next, with, without, guidance.scale, kPatch, delta);
            return next;
        }
        const auto picture = [&](const at::Tensor& tokens) {
            return unpatchify(tokens, kPatch, latents.size(2) / kPatch, latents.size(3) / kPatch);
        };
        const at::Tensor alone = picture(with), prediction = alone + (alone - picture(without)) * guidance.scale;
        const at::Tensor norm_max = at::linalg_vector_norm(alone) * guidance.normalization,
                         norm = at::linalg_vector_norm(prediction);
        return next.add_(prediction * at::where(norm > norm_max, norm_max / norm, at::ones_like(norm)) * delta);
    };
}

at::Tensor Sampler::run(at::Tensor latents, const std::vector<float>& sigmas, const std::vector<float>& times,
                        const Captions& captions, const Guidance& guidance, const Lora& lora, Task& task,
                        const std::function<void(const at::Tensor&)>& watch) {
    const Transformer::Positions positive = positions(latents, captions.positive);
    const Transformer::Positions negative = captions.negative.defined() ? positions(latents, captions.negative) : positive;
    const Transformer::Modulation modulation = transformer_.modulate(times, lora.pairs);
    std::vector<float> falls;
    for (size_t i = 0; i < times.size(); ++i) falls.push_back(sigmas[i] - sigmas[i + 1]);
    const at::Tensor deltas = at::tensor(falls, at::TensorOptions().dtype(at::kFloat)).to(latents.device());

    if (watch) watch(latents);
    for (size_t i = 0; i < times.size(); ++i) {
        task.check();
        const bool guided = captions.negative.defined() && !(static_cast<double>(times[i]) > guidance.truncation);
        const auto now = static_cast<int64_t>(i);
        const Transformer::Modulation at_now = modulation.at(now);
        std::vector<at::Tensor> inputs = {latents, at_now.blocks, at_now.final_scale, deltas.narrow(0, now, 1),
                                          captions.positive};
        if (guided) inputs.push_back(captions.negative);
        const std::string key =
            concat("step ", guided ? guidance.scale : 0, ' ', guided ? guidance.normalization : 0, ' ', lora.name);
        latents = graphs_.run(key, inputs, [&] { return step(positive, negative, guided, guidance, lora); });
        // The next step is sent once this one is done: so a cancel waits for one step at most, and the device for microseconds.
        stream_.synchronize();
        task.add_steps(1);
        if (watch) watch(latents);
    }
    return latents;
}

}  // namespace diffusionz
