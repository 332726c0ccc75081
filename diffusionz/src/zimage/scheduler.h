// Flow-matching Euler schedule. Reference: diffusers' FlowMatchEulerDiscreteScheduler as ZImagePipeline drives it.
#pragma once

#include <cstdint>
#include <vector>

#include "core/json_file.h"

namespace diffusionz {

struct SchedulerConfig {
    double shift = 3.0;
    int64_t num_train_timesteps = 1000;
    bool use_dynamic_shifting = false;
    bool exponential_time_shift = true;  // else linear
    double base_shift = 0.5, max_shift = 1.15;
    int64_t base_image_tokens = 256, max_image_tokens = 4096;

    static SchedulerConfig from_json(const JsonFile& json);
};

// Sigmas of `num_steps` Euler steps over an image of `image_tokens` tokens, falling from 1, with the final 0 appended: num_steps
// + 1 values.
std::vector<float> make_sigmas(const SchedulerConfig& config, int64_t num_steps, int64_t image_tokens);

// The transformer's time, 1 - sigma, rounded as the reference rounds on its way through timesteps.
float time_of_sigma(const SchedulerConfig& config, float sigma);

}  // namespace diffusionz
