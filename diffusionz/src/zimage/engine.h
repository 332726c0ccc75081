// What draws on one device: a shared model, its LoRA adapters, and what it has recorded.
#pragma once

#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/cuda_graph.h"
#include "zimage/lora.h"
#include "zimage/model.h"
#include "zimage/sampler.h"

namespace diffusionz {

// One drawn picture.
struct Picture {
    at::Tensor pixels;  // uint8 [height, width, 3] on the host
};

class Engine {
public:
    // `cuda_graphs` lets it record what it repeats. `max_vram_bytes` bounds what the model holds on its device; 0 does not.
    Engine(const std::filesystem::path& path, Placement placement, bool cuda_graphs = true, int64_t max_vram_bytes = 0);

    // Draws one picture, with the previews that `task` wants, as those of picture `image`. The request has passed check(). Steps
    // are counted in `task`, pictures are not. Fails with E_ARGUMENT, E_LORA, E_CANCELLED.
    Picture draw(const DiffusionZRequest& request, Task& task, int32_t image = 0);
    // Transformer evaluations that a request takes.
    static int32_t steps_of(const DiffusionZRequest& request);
    // Fails with E_ARGUMENT when the model cannot draw it.
    void check(const DiffusionZRequest& request) const;

    // Gives back the memory of what it recorded; later calls record again.
    void forget_graphs();

    void load_lora(const std::filesystem::path& path, double weight);
    void unload_lora();

    // The parameters that a picture of `request` carries, as JSON.
    std::string metadata(const DiffusionZRequest& request) const;
    // What the model is, as JSON.
    std::string info() const;

    // Called on the drawing thread with the latents at the start and after each step.
    void watch_latents(std::function<void(const at::Tensor& latents)> watcher) { latents_watcher_ = std::move(watcher); }

    const Model& model() const { return *model_; }
    int32_t shared_by() const { return static_cast<int32_t>(model_.use_count()); }
    int64_t lora_bytes();

private:
    struct LoadedLora {
        std::shared_ptr<const LoraAdapter> adapter;
        double weight;
        bool operator==(const LoadedLora&) const = default;
    };

    // The text encoder's features of a prompt [tokens, hidden_size].
    at::Tensor features(const char* prompt);
    // Noise, or the request's image with noise, and the sigmas left to run.
    at::Tensor start(const DiffusionZRequest& request, std::vector<float>& sigmas) const;
    // The picture of latents, uint8 [height, width, 3] on the host.
    at::Tensor decode(const at::Tensor& latents);
    // The same, or an undefined tensor where the host has no memory for it.
    at::Tensor decode_if_it_fits(const at::Tensor& latents);
    // The adapters of a request, valid until the next call of it.
    Sampler::Lora lora_of(const DiffusionZRequest& request);
    std::shared_ptr<const LoraAdapter> read_lora(const std::filesystem::path& path) const;

    std::shared_ptr<const Model> model_;
    std::mutex mutex_;  // held by draw() and what changes or reads the adapters; who draws next is the fleet's to say
    WorkStream stream_;
    GraphCache graphs_;
    Sampler sampler_;
    std::function<void(const at::Tensor&)> latents_watcher_;
    std::list<std::pair<std::vector<int32_t>, at::Tensor>> features_;  // of the last prompts, the last used first

    std::vector<LoadedLora> loras_;
    std::shared_ptr<const LoraAdapter> call_lora_;  // the last one that a call brought: a series of calls reads its file once
    LoraPairs pairs_;                               // of the running request
    std::vector<LoadedLora> active_loras_;          // whose corrections lora_bank_ holds
    std::optional<LoraBank> lora_bank_;             // on devices that record steps
    int64_t lora_bank_number_ = 0;
};

}  // namespace diffusionz
