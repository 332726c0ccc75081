#include "zimage/model.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "core/error.h"

namespace diffusionz {
namespace fs = std::filesystem;
namespace {

// Changes whenever a file of the model does.
std::string fingerprint(const fs::path& path) {
    std::vector<std::string> files;
    const auto add = [&](const fs::path& file) {
        std::error_code error;
        const auto size = fs::file_size(file, error);
        files.push_back(concat(file.string(), ' ', size, ' ', fs::last_write_time(file, error).time_since_epoch().count()));
    };
    std::error_code error;
    if (fs::is_regular_file(path, error)) add(path);
    for (fs::recursive_directory_iterator entry(path, error), end; !error && entry != end; entry.increment(error)) {
        if (entry.depth() > 0) entry.disable_recursion_pending();
        if (entry->is_regular_file(error)) add(entry->path());
    }
    std::sort(files.begin(), files.end());
    std::string text;
    for (const std::string& file : files) text += file + '\n';
    return text;
}

}  // namespace

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
    static std::mutex mutex;
    static std::map<std::string, std::weak_ptr<const Model>> loaded;
    std::error_code error;
    const fs::path canonical = fs::canonical(path, error);
    if (error) fail(DIFFUSIONZ_E_MODEL, path.string(), ": ", error.message());
    // Held while loading: however many ask for one model at once, it is read once.
    const std::lock_guard lock(mutex);
    std::erase_if(loaded, [](const auto& entry) { return entry.second.expired(); });
    auto& slot = loaded[concat(placement.device.str(), ' ', static_cast<int>(placement.dtype), '\n', fingerprint(canonical))];
    std::shared_ptr<const Model> model = slot.lock();
    if (!model) slot = model = std::make_shared<const Model>(canonical, placement);
    return model;
}

}  // namespace diffusionz
