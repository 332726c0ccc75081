// Finds a Z-Image model's components on disk, in any of the layouts that people have, and gives their tensors diffusers' names.
#pragma once

#include <filesystem>
#include <memory>

#include "core/checkpoint.h"
#include "zimage/scheduler.h"
#include "zimage/text_encoder.h"
#include "zimage/transformer.h"
#include "zimage/vae.h"

namespace diffusionz {

struct ModelFiles {
    std::filesystem::path tokenizer_json;
    std::shared_ptr<Checkpoint> text_encoder, transformer, vae;
    TextEncoderConfig text_encoder_config;
    TransformerConfig transformer_config;
    VaeConfig vae_config;
    SchedulerConfig scheduler_config;
};

// tokenizer.json of a model whose files are in `root`; "" when there is none.
std::filesystem::path find_tokenizer(const std::filesystem::path& root);

// `path` is
//  - a folder in the diffusers layout: transformer/, text_encoder/, vae/, tokenizer/, scheduler/, each with its config;
//  - a folder in ComfyUI's layout: diffusion_models/, text_encoders/, vae/ with a single file each, in the original naming, and
//  tokenizer/;
//  - one safetensors file with all components (model.diffusion_model., text_encoders., vae. prefixes), tokenizer.json or
//  tokenizer/ beside it.
// Fails with E_MODEL.
ModelFiles find_model_files(const std::filesystem::path& path);

}  // namespace diffusionz
