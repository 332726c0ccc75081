// A Chronos-2 model's shape, as upstream's config.json says it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

namespace diffusionz::chronos {

struct ModelConfig {
    int64_t d_model, d_kv, heads, layers, d_ff;
    double norm_epsilon, rope_theta;
    int64_t context_length;      // steps of history that the model reads
    int64_t patch;               // steps of a token, in and out
    int64_t max_output_patches;  // of one pass
    double time_encoding_scale;  // steps
    bool arcsinh, register_token;
    std::vector<double> quantiles;  // ascending

    int64_t inner() const { return heads * d_kv; }
    int64_t horizon() const { return max_output_patches * patch; }  // of one pass, steps
};

// Reads folder/config.json. Fails with E_MODEL for what is no Chronos-2.
ModelConfig read_config(const std::filesystem::path& folder);

}  // namespace diffusionz::chronos
