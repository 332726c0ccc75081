#include "chronos/parameters.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "core/error.h"
#include "core/json_file.h"
#include "core/peft_scale.h"

namespace diffusionz::chronos {
namespace fs = std::filesystem;

ModelFolders find_folders(const fs::path& path, const fs::path& lora) {
    std::error_code error;
    if (!lora.empty() && !fs::is_directory(lora, error))
        fail(DIFFUSIONZ_E_LORA, lora.string(), ": no such folder; an adapter of upstream's fit is one");
    const bool is_adapter = fs::exists(path / "adapter_config.json", error) && !fs::exists(path / "config.json", error);
    if (!is_adapter) return {path, lora};
    if (!lora.empty())
        fail(DIFFUSIONZ_E_ARGUMENT, "lora_path is ", lora.string(), " and the model, ", path.string(),
             ", is an adapter itself; give one");
    const JsonFile config = JsonFile::load(path / "adapter_config.json", DIFFUSIONZ_E_LORA);
    const fs::path base = config.text("base_model_name_or_path", "");
    for (const fs::path& folder : {base, path / base}) {
        if (!base.empty() && fs::exists(folder / "config.json", error)) return {folder, path};
    }
    fail(DIFFUSIONZ_E_LORA, config.name(), ": base_model_name_or_path is '", base.string(),
         "', which is no model's folder here; load the base model with this adapter as lora_path");
}

Parameters::Parameters(const ModelFolders& folders)
    : checkpoint_(std::make_shared<const Checkpoint>(Checkpoint::from_folder(folders.model))) {
    if (!folders.lora.empty()) read_lora(folders.lora);
}

void Parameters::read_lora(const fs::path& folder) {
    const fs::path file = folder / "adapter_model.safetensors";
    std::error_code error;
    for (const fs::path& part : {file, folder / "adapter_config.json"}) {  // which holds the scale
        if (!fs::exists(part, error))
            fail(DIFFUSIONZ_E_LORA, folder.string(), ": no ", part.filename().string(),
                 " in it; an adapter of upstream's fit has one");
    }
    const auto adapter = std::make_shared<const Checkpoint>(Checkpoint::from_file(file, "", DIFFUSIONZ_E_LORA));
    if (adapter->tensors().empty()) fail(DIFFUSIONZ_E_LORA, file.string(), ": no tensors in it");
    for (const auto& [key, view] : adapter->tensors()) {
        const std::string prefix = "base_model.model.", down = ".lora_A.weight", up = ".lora_B.weight";
        const std::string name = key.starts_with(prefix) ? key.substr(prefix.size()) : key;
        const bool is_down = name.ends_with(down);
        const std::string module = name.substr(0, name.size() - std::min(name.size(), down.size()));
        const auto weight = checkpoint_->tensors().find(module + ".weight");
        if ((!is_down && !name.ends_with(up)) || weight == checkpoint_->tensors().end() || weight->second.shape.size() != 2) {
            fail(DIFFUSIONZ_E_LORA, file.string(), ": '", key,
                 "' does not fit this model; an adapter has lora_A and lora_B of its linear "
                 "layers, and nothing else");
        }
        // The file is not kept open: its numbers are few.
        at::Tensor& part = is_down ? lora_[module + ".weight"].down : lora_[module + ".weight"].up;
        part =
            as_tensor(view, adapter, file.string() + ": '" + key + "'", DIFFUSIONZ_E_LORA).to(at::kFloat, false, /*copy=*/true);
    }
    const PeftScale scale_of(file, adapter->metadata());
    for (auto& [name, pair] : lora_) {
        const auto& shape = checkpoint_->at(name).shape;
        if (!pair.down.defined() || !pair.up.defined())
            fail(DIFFUSIONZ_E_LORA, file.string(), ": ", name, " has no ", pair.down.defined() ? "lora_B" : "lora_A");
        if (pair.down.dim() != 2 || pair.up.dim() != 2 || pair.down.size(0) != pair.up.size(1) || pair.down.size(0) < 1 ||
            pair.down.size(1) != shape[1] || pair.up.size(0) != shape[0]) {
            fail(DIFFUSIONZ_E_LORA, file.string(), ": ", name, " has matrices ", shape_text(pair.down.sizes().vec()), " and ",
                 shape_text(pair.up.sizes().vec()), "; this model needs [rank, ", shape[1], "] and [", shape[0], ", rank]");
        }
        pair.scale = scale_of(name.substr(0, name.size() - std::string(".weight").size()), pair.down.size(0));
    }
}

at::Tensor Parameters::get(const std::string& name, const std::vector<int64_t>& shape) const {
    const at::Tensor weight = Weights(checkpoint_, {}).get_on_host(name, shape).to(at::kFloat);
    const auto found = lora_.find(name);
    if (found == lora_.end()) return weight;
    return weight + at::mm(found->second.up, found->second.down) * found->second.scale;
}

int64_t Parameters::count() const {
    int64_t total = 0;
    for (const auto& [name, view] : checkpoint_->tensors()) {
        int64_t count = 1;
        for (const int64_t side : view.shape) count *= side;
        total += count;
    }
    return total;
}

}  // namespace diffusionz::chronos
