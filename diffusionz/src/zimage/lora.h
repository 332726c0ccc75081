// LoRA adapters (Hu et al. 2021) from files of diffusers/PEFT, kohya and ComfyUI naming.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
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

// Corrections in buffers that stay where they are, for recorded steps that read whichever adapters were loaded last. All that
// corrects one layer becomes one pair, scales multiplied into `up`, and its rank is rounded up to a bucket with zeros.
class LoraBank {
public:
    // Buffers for corrections of the shape of `pairs`, filled with them.
    explicit LoraBank(const LoraPairs& pairs);

    // Whether `pairs` would have the same buffers.
    bool fits(const LoraPairs& pairs) const;
    // Fills the buffers with pairs that fit.
    void load(const LoraPairs& pairs);
    const LoraPairs& pairs() const { return buffers_; }

private:
    LoraPairs buffers_;
};

}  // namespace diffusionz
