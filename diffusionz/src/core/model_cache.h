// Models already loaded in this process, so that engines of the same files share their weights.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "core/weights.h"

namespace diffusionz {

// Changes whenever a file of the model at `path` (a file, or a folder two deep) does, and differs for other placements. Fails
// with E_MODEL when there is nothing at `path`.
std::string model_key(const std::filesystem::path& path, const Placement& placement);

template <class Model>
class ModelCache {
public:
    // The model of that key, made by `make` unless an engine still holds it.
    template <class Make>
    std::shared_ptr<const Model> get(const std::string& key, Make&& make) {
        // Held while loading: however many ask for one model at once, it is read once.
        const std::lock_guard lock(mutex_);
        std::erase_if(models_, [](const auto& entry) { return entry.second.expired(); });
        auto& slot = models_[key];
        std::shared_ptr<const Model> model = slot.lock();
        if (!model) slot = model = make();
        return model;
    }

private:
    std::mutex mutex_;
    std::map<std::string, std::weak_ptr<const Model>> models_;
};

}  // namespace diffusionz
