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
    // The model of that key, made by `make` unless an engine still holds it. However many ask for one model at once, it is read
    // once; others are read meanwhile.
    template <class Make>
    std::shared_ptr<const Model> get(const std::string& key, Make&& make) {
        std::shared_ptr<Slot> slot;
        {
            const std::lock_guard lock(mutex_);
            // Slots that nobody waits for, of models that are gone.
            std::erase_if(slots_,
                          [](const auto& entry) { return entry.second.use_count() == 1 && entry.second->model.expired(); });
            slot = slots_.try_emplace(key, std::make_shared<Slot>()).first->second;
        }
        const std::lock_guard loading(slot->loading);
        std::shared_ptr<const Model> model = slot->model.lock();
        if (!model) slot->model = model = make();
        return model;
    }

private:
    struct Slot {
        std::mutex loading;
        std::weak_ptr<const Model> model;
    };

    std::mutex mutex_;
    std::map<std::string, std::shared_ptr<Slot>> slots_;
};

}  // namespace diffusionz
