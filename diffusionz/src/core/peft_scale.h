// The scale of PEFT's LoRA adapters: lora_alpha / rank, and its variants.
#pragma once

#include <cmath>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace diffusionz {

// PEFT's config has the lora_alpha that its files lack: diffusers keeps it as JSON in the header's metadata, PEFT in a
// file beside. Without it alpha is the rank.
class PeftScale {
public:
    // `path` is the safetensors file, `metadata` its header's. Fails with E_LORA.
    PeftScale(const std::filesystem::path& path, const std::map<std::string, std::string>& metadata);

    // The factor of B A for `module`, whose matrices have that rank.
    double operator()(const std::string& module, int64_t rank) const;

private:
    void read(std::string_view text, const std::string& name);

    double alpha_ = NAN;
    bool rank_stabilized_ = false;
    std::vector<std::pair<std::string, double>> patterns_;
};

}  // namespace diffusionz
