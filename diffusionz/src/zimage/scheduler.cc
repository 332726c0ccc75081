#include "zimage/scheduler.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <cmath>

#include "core/error.h"

namespace diffusionz {

SchedulerConfig SchedulerConfig::from_json(const JsonFile& json) {
    const std::string type = json.text("_class_name", "FlowMatchEulerDiscreteScheduler");
    if (type != "FlowMatchEulerDiscreteScheduler")
        fail(DIFFUSIONZ_E_MODEL, json.name(), ": _class_name is '", type, "'; it must be FlowMatchEulerDiscreteScheduler");
    for (const char* unsupported :
         {"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling"}) {
        if (json.boolean(unsupported, false))
            fail(DIFFUSIONZ_E_MODEL, json.name(), ": ", unsupported, " is true; it is not supported");
    }
    if (json.has("shift_terminal") && json.number("shift_terminal", 0, -1e9, 1e9) != 0)
        fail(DIFFUSIONZ_E_MODEL, json.name(), ": shift_terminal is not supported");
    SchedulerConfig config;
    config.shift = json.number("shift", 1.0, 1e-6, 1e6);
    config.num_train_timesteps = json.integer("num_train_timesteps", 1000, 1, 1'000'000);
    config.use_dynamic_shifting = json.boolean("use_dynamic_shifting", false);
    const std::string time_shift = json.text("time_shift_type", "exponential");
    if (time_shift != "exponential" && time_shift != "linear")
        fail(DIFFUSIONZ_E_MODEL, json.name(), ": time_shift_type is '", time_shift, "'; allowed are exponential and linear");
    config.exponential_time_shift = time_shift == "exponential";
    config.base_shift = json.number("base_shift", config.base_shift, -100, 100);
    config.max_shift = json.number("max_shift", config.max_shift, -100, 100);
    config.base_image_tokens = json.integer("base_image_seq_len", config.base_image_tokens, 1, 1 << 30);
    config.max_image_tokens = json.integer("max_image_seq_len", config.max_image_tokens, 1, 1 << 30);
    return config;
}

std::vector<float> make_sigmas(const SchedulerConfig& config, int64_t num_steps, int64_t image_tokens) {
    // In float32 throughout, as the reference computes: the times are inputs of the transformer, whose output follows every bit.
    at::Tensor sigmas = at::linspace(1.0, 1.0 / static_cast<double>(num_steps), num_steps, at::TensorOptions().dtype(at::kFloat));
    if (config.use_dynamic_shifting) {
        const double slope =
            (config.max_shift - config.base_shift) / static_cast<double>(config.max_image_tokens - config.base_image_tokens);
        const double mu = static_cast<double>(image_tokens) * slope +
                          (config.base_shift - slope * static_cast<double>(config.base_image_tokens));
        const double factor = config.exponential_time_shift ? std::exp(mu) : mu;
        // A division of two tensors: ATen makes a scalar over a tensor a product with the reciprocal, which rounds twice.
        sigmas = at::scalar_tensor(factor, sigmas.options()) / (at::reciprocal(sigmas) - 1 + factor);
    } else {
        sigmas = sigmas * config.shift / (sigmas * (config.shift - 1) + 1);
    }
    std::vector<float> values(sigmas.const_data_ptr<float>(), sigmas.const_data_ptr<float>() + num_steps);
    values.push_back(0.0f);
    for (size_t i = 1; i < values.size(); ++i) {
        if (!(values[i] < values[i - 1]))
            fail(DIFFUSIONZ_E_MODEL, "the scheduler's shifts give ", num_steps, " steps a sigma that does not fall: number ", i,
                 ", ", values[i - 1], " to ", values[i]);
    }
    return values;
}

float time_of_sigma(const SchedulerConfig& config, float sigma) {
    const float timestep = sigma * static_cast<float>(config.num_train_timesteps);
    return (1000.0f - timestep) / 1000.0f;
}

}  // namespace diffusionz
