#include "zimage/model.h"

#include "core/model_cache.h"

namespace diffusionz {
namespace fs = std::filesystem;

Model::Model(const fs::path& path, Placement placement) : Model(path, placement, find_model_files(path)) {}

Model::Model(const fs::path& path, Placement placement, const ModelFiles& files)
    : path_(path),
      placement_(placement),
      tokenizer_(Tokenizer::from_file(files.tokenizer_json)),
      text_encoder_(files.text_encoder_config, Weights(files.text_encoder, placement)),
      transformer_(files.transformer_config, Weights(files.transformer, placement)),
      vae_(files.vae_config, Weights(files.vae, placement)),
      scheduler_(files.scheduler_config) {}

std::shared_ptr<const Model> Model::load(const fs::path& path, Placement placement) {
    static ModelCache<Model> cache;
    return cache.get(model_key(path, placement), [&] { return std::make_shared<const Model>(fs::canonical(path), placement); });
}

}  // namespace diffusionz
