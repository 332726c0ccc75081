// A loaded Z-Image model: immutable, shared by every engine that asks for the same files on the same device in the same
// precision.
#pragma once

#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>

#include "core/tokenizer.h"
#include "core/weights.h"
#include "zimage/model_files.h"

namespace diffusionz {

// What stays on the device for good. The rest stays on the host and comes for its stage.
struct Residence {
    bool text_encoder = true;
    bool vae = true;
};

class Model {
public:
    Model(const std::filesystem::path& path, const ModelFiles& files, Placement placement, Residence residence);

    // The model already loaded in this process, or a new one. Files that changed on disk since make a new one. max_vram_bytes, of
    // a CUDA device: 0 is no limit. Fails with E_OUT_OF_MEMORY when it cannot be had in so few.
    static std::shared_ptr<const Model> load(const std::filesystem::path& path, Placement placement, int64_t max_vram_bytes = 0);

    const std::filesystem::path& path() const { return path_; }
    const Placement& placement() const { return placement_; }
    const Tokenizer& tokenizer() const { return tokenizer_; }
    const TextEncoder& text_encoder() const { return text_encoder_; }
    const Transformer& transformer() const { return transformer_; }
    // To be held for the stage that needs it: where it does not stay on the device, it comes with the first holder and goes with
    // the last, whose work on the device must be done by then.
    std::shared_ptr<const Vae> vae() const;
    const VaeConfig& vae_config() const { return vae_config_; }
    bool has_vae_encoder() const { return has_vae_encoder_; }
    const SchedulerConfig& scheduler() const { return scheduler_; }
    const Residence& residence() const { return residence_; }

    // Of what stays on the device.
    size_t nbytes() const;
    int64_t size_multiple() const { return vae_config_.scale() * Transformer::kPatch; }  // of a picture's sides, pixels
    int64_t height_max() const { return transformer_.config().axes_lens[1] * size_multiple(); }
    int64_t width_max() const { return transformer_.config().axes_lens[2] * size_multiple(); }

private:
    std::filesystem::path path_;
    Placement placement_;
    Residence residence_;
    Tokenizer tokenizer_;
    Transformer transformer_;
    TextEncoder text_encoder_;
    VaeConfig vae_config_;
    std::shared_ptr<const Vae> resident_vae_;  // null when it only visits
    bool has_vae_encoder_;
    std::optional<Weights> vae_weights_;  // of one that visits
    SchedulerConfig scheduler_;
    mutable std::mutex vae_mutex_;
    mutable std::weak_ptr<const Vae> visiting_vae_;
};

}  // namespace diffusionz
