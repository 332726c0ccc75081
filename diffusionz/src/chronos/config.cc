#include "chronos/config.h"

#include "core/error.h"
#include "core/json_file.h"

namespace diffusionz::chronos {
namespace fs = std::filesystem;

ModelConfig read_config(const fs::path& folder) {
    std::error_code error;
    if (!fs::is_directory(folder, error)) fail(DIFFUSIONZ_E_MODEL, folder.string(), ": no such folder; a Chronos-2 model is one");
    if (!fs::exists(folder / "config.json", error)) {
        const bool zimage = fs::exists(folder / "model_index.json", error);
        fail(DIFFUSIONZ_E_MODEL, folder.string(), ": no config.json in it; ",
             zimage ? "this is a model that draws: diffusionz_init loads it" : "a Chronos-2 model has one");
    }
    const JsonFile core = JsonFile::load(folder / "config.json");
    if (!core.has("chronos_config")) fail(DIFFUSIONZ_E_MODEL, core.name(), ": no chronos_config; this is no Chronos-2 model");
    const std::string class_name = core.has("architectures") && core.object()["architectures"].is_array() &&
                                           !core.object()["architectures"].empty() &&
                                           core.object()["architectures"][0].is_string()
                                       ? core.object()["architectures"][0].get<std::string>()
                                       : "Chronos2Model";
    if (class_name != "Chronos2Model") {
        fail(DIFFUSIONZ_E_MODEL, core.name(), ": architecture is ", class_name,
             "; it must be Chronos2Model (Chronos and Chronos-Bolt are other models)");
    }
    const JsonFile forecasting = core.child("chronos_config");
    const auto require = [](const JsonFile& json, const std::string& key) {
        if (!json.has(key)) fail(DIFFUSIONZ_E_MODEL, json.name(), ": ", key, " is missing");
    };
    for (const char* key : {"context_length", "input_patch_size", "output_patch_size", "quantiles"}) require(forecasting, key);

    // The defaults are upstream's (Chronos2CoreConfig, Chronos2ForecastingConfig).
    ModelConfig config{};
    config.d_model = core.integer("d_model", 512, 1, 65536);
    config.d_kv = core.integer("d_kv", 64, 2, 1024);
    config.heads = core.integer("num_heads", 8, 1, 1024);
    config.layers = core.integer("num_layers", 6, 1, 1024);
    config.d_ff = core.integer("d_ff", 2048, 1, 1 << 20);
    config.norm_epsilon = core.number("layer_norm_epsilon", 1e-6, 0, 1);
    config.rope_theta = core.number("rope_theta", 10000.0, 1, 1e12);
    if (config.d_kv % 2) fail(DIFFUSIONZ_E_MODEL, core.name(), ": d_kv is ", config.d_kv, "; it must be even");
    const std::string activation = core.text("feed_forward_proj", "relu");
    if (activation != "relu") fail(DIFFUSIONZ_E_MODEL, core.name(), ": feed_forward_proj is ", activation, "; supported is relu");

    config.context_length = forecasting.integer("context_length", 0, 1, 1 << 24);
    config.patch = forecasting.integer("input_patch_size", 0, 1, 4096);
    forecasting.integer("output_patch_size", 0, config.patch, config.patch);
    forecasting.integer("input_patch_stride", config.patch, config.patch, config.patch);
    config.max_output_patches = forecasting.integer("max_output_patches", 1, 1, 65536);
    config.time_encoding_scale =
        static_cast<double>(forecasting.integer("time_encoding_scale", config.context_length, 1, int64_t{1} << 40));
    config.arcsinh = forecasting.boolean("use_arcsinh", false);
    config.register_token = forecasting.boolean("use_reg_token", false);
    config.quantiles = forecasting.numbers("quantiles", 0, 1);
    for (size_t i = 0; i < config.quantiles.size(); ++i) {
        const double level = config.quantiles[i];
        if (!(level > 0 && level < 1) || (i > 0 && !(level > config.quantiles[i - 1])))
            fail(DIFFUSIONZ_E_MODEL, forecasting.name(), ": quantiles must ascend, each over 0 and under 1; number ", i, " is ",
                 level);
    }
    if (config.quantiles.empty()) fail(DIFFUSIONZ_E_MODEL, forecasting.name(), ": quantiles is empty");
    return config;
}

}  // namespace diffusionz::chronos
