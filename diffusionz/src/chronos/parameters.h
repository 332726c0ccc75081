// A Chronos-2 model's tensors by upstream's names, with an adapter merged in.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/weights.h"

namespace diffusionz::chronos {

// What a path names: a model's folder, and an adapter's on top of it.
struct ModelFolders {
    std::filesystem::path model;
    std::filesystem::path lora;  // empty for none
};

// `path` is a model's folder, or an adapter's (adapter_config.json), whose base must then be a folder: absolute, relative to the
// working directory or to the adapter's own. Fails with E_MODEL, E_LORA, E_ARGUMENT (an adapter and `lora` too).
ModelFolders find_folders(const std::filesystem::path& path, const std::filesystem::path& lora);

class Parameters {
public:
    // Fails with E_MODEL, and E_LORA when a tensor of the adapter does not fit the model.
    explicit Parameters(const ModelFolders& folders);

    // float32 on the host, exactly `shape`; W + scale B A for what the adapter changes. Fails with E_MODEL.
    at::Tensor get(const std::string& name, const std::vector<int64_t>& shape) const;
    // Parameters of the model's files.
    int64_t count() const;
    void release_pages() const { checkpoint_->release_pages(); }

private:
    struct LowRank {
        at::Tensor down, up;  // A [rank, in], B [out, rank], float32
        double scale = 1.0;
    };
    void read_lora(const std::filesystem::path& folder);

    std::shared_ptr<const Checkpoint> checkpoint_;
    std::map<std::string, LowRank> lora_;  // by the name of the weight
};

}  // namespace diffusionz::chronos
