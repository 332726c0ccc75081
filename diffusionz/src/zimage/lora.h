// LoRA adapters (Hu et al. 2021) from files of diffusers/PEFT, kohya and ComfyUI naming.
#pragma once

#include <filesystem>
#include <vector>

#include "ops/linear.h"
#include "zimage/transformer.h"

namespace diffusionz {

class LoraAdapter {
public:
    // Fails with E_LORA when the file is damaged, or when under 95 % of its keys match the transformer: it would be another
    // model's.
    LoraAdapter(const std::filesystem::path& path, const Transformer& transformer, const Placement& placement);

    const std::filesystem::path& path() const { return path_; }
    // False once the file was written again, or is gone.
    bool is_current() const;
    size_t nbytes() const { return nbytes_; }
    // Adds its corrections, times `weight`, to `pairs`.
    void add_to(LoraPairs& pairs, double weight) const;

private:
    std::filesystem::path path_;
    std::filesystem::file_time_type written_;
    std::vector<std::pair<const Linear*, LoraPair>> pairs_;
    size_t nbytes_ = 0;
};

}  // namespace diffusionz
