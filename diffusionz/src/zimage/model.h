// A loaded Z-Image model: immutable, shared by every engine that asks for the same files on the same device in the same
// precision.
#pragma once

#include <filesystem>
#include <memory>

#include "core/tokenizer.h"
#include "core/weights.h"
#include "zimage/model_files.h"

namespace diffusionz {

class Model {
public:
    Model(const std::filesystem::path& path, Placement placement);

    // The model already loaded in this process, or a new one. Files that changed on disk since make a new one.
    static std::shared_ptr<const Model> load(const std::filesystem::path& path, Placement placement);

    const std::filesystem::path& path() const { return path_; }
    const Placement& placement() const { return placement_; }
    const Tokenizer& tokenizer() const { return tokenizer_; }
    const TextEncoder& text_encoder() const { return text_encoder_; }
    const Transformer& transformer() const { return transformer_; }
    const Vae& vae() const { return vae_; }
    const SchedulerConfig& scheduler() const { return scheduler_; }

    size_t nbytes() const { return text_encoder_.nbytes() + transformer_.nbytes() + vae_.nbytes(); }
    int64_t size_multiple() const { return vae_.config().scale() * Transformer::kPatch; }  // of a picture's sides, pixels
    int64_t height_max() const { return transformer_.config().axes_lens[1] * size_multiple(); }
    int64_t width_max() const { return transformer_.config().axes_lens[2] * size_multiple(); }

private:
    Model(const std::filesystem::path& path, Placement placement, const ModelFiles& files);

    std::filesystem::path path_;
    Placement placement_;
    Tokenizer tokenizer_;
    TextEncoder text_encoder_;
    Transformer transformer_;
    Vae vae_;
    SchedulerConfig scheduler_;
};

}  // namespace diffusionz
