// One context of the C ABI: a shared model, this context's LoRA adapters, and its queue of calls.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/call_queue.h"
#include "zimage/lora.h"
#include "zimage/model.h"

namespace diffusionz {

// One drawn picture.
struct Picture {
    at::Tensor pixels;  // uint8 [height, width, 3] on the host
};

class Engine {
public:
    Engine(const std::filesystem::path& path, Placement placement);

    // Draws every request, in order, after the calls before this one. Requests have passed check(). Fails with E_ARGUMENT,
    // E_LORA, E_CANCELLED.
    std::vector<Picture> generate(const std::vector<DiffusionZRequest>& requests, Task& task);
    // Fails with E_ARGUMENT when the model cannot draw it.
    void check(const DiffusionZRequest& request) const;

    // Waits for the calls that run or queue.
    void drain() { const CallQueue::Turn turn(queue_); }

    void load_lora(const std::filesystem::path& path, double weight);
    void unload_lora();

    // The parameters that a picture of `request` carries, as JSON.
    std::string metadata(const DiffusionZRequest& request) const;
    // What the model is, as JSON.
    std::string info() const;

    // Called on the drawing thread with the latents at the start and after each step: what a preview is made of.
    void watch_latents(std::function<void(const at::Tensor& latents)> watcher) { latents_watcher_ = std::move(watcher); }

    const Model& model() const { return *model_; }
    int32_t shared_by() const { return static_cast<int32_t>(model_.use_count()); }
    int64_t lora_bytes();

private:
    struct LoadedLora {
        std::shared_ptr<const LoraAdapter> adapter;
        double weight;
    };

    Picture draw(const DiffusionZRequest& request, Task& task);
    at::Tensor caption(const char* prompt, const LoraPairs* lora) const;
    // Noise, or the request's image with noise, and the sigmas left to run.
    at::Tensor start(const DiffusionZRequest& request, std::vector<float>& sigmas) const;
    at::Tensor denoise(const DiffusionZRequest& request, at::Tensor latents, const std::vector<float>& sigmas,
                       const at::Tensor& positive, const at::Tensor& negative, const LoraPairs* lora, Task& task) const;
    std::optional<LoraPairs> lora_pairs(const DiffusionZRequest& request);
    std::shared_ptr<const LoraAdapter> read_lora(const std::filesystem::path& path) const;

    std::shared_ptr<const Model> model_;
    CallQueue queue_;
    std::function<void(const at::Tensor&)> latents_watcher_;
    std::vector<LoadedLora> loras_;
    std::shared_ptr<const LoraAdapter> call_lora_;  // the last one that a call brought: a series of calls reads its file once
};

}  // namespace diffusionz
