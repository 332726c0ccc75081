#include "core/peft_scale.h"

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/json_depth.h"
#include "core/mapped_file.h"

namespace diffusionz {

PeftScale::PeftScale(const std::filesystem::path& path, const std::map<std::string, std::string>& metadata) {
    const auto found = metadata.find("lora_adapter_metadata");
    const std::filesystem::path beside = path.parent_path() / "adapter_config.json";
    if (found != metadata.end()) {
        read(found->second, path.string() + ": lora_adapter_metadata");
    } else if (path.filename() == "adapter_model.safetensors" && std::filesystem::exists(beside)) {
        read(MappedFile(beside, DIFFUSIONZ_E_LORA).text(), beside.string());
    }
}

double PeftScale::operator()(const std::string& module, int64_t rank) const {
    double alpha = alpha_;
    for (const auto& [pattern, value] : patterns_) {
        // The first that matches as PEFT's (.*\.)?(pattern)$ does; one with ^ names the whole module.
        const bool whole = pattern.starts_with('^');
        if (whole ? module != pattern.substr(1) : module != pattern && !module.ends_with("." + pattern)) continue;
        alpha = value;
        break;
    }
    if (std::isnan(alpha)) return 1.0;
    return alpha / (rank_stabilized_ ? std::sqrt(static_cast<double>(rank)) : static_cast<double>(rank));
}

// A scale that is misread draws another picture in silence, so what is not understood is refused.
void PeftScale::read(std::string_view text, const std::string& name) {
    if (json_too_deep(text)) fail(DIFFUSIONZ_E_LORA, name, ": nested deeper than ", kJsonDepthMax, " levels");
    const auto json = nlohmann::ordered_json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!json.is_object()) fail(DIFFUSIONZ_E_LORA, name, ": not a JSON object");
    const auto field = [&](const std::string& key) {
        return json.contains(key) ? json[key] : json.value("transformer." + key, nlohmann::ordered_json());
    };
    const auto alpha = field("lora_alpha");
    if (!alpha.is_null() && !alpha.is_number())
        fail(DIFFUSIONZ_E_LORA, name, ": lora_alpha is ", alpha.dump(), "; it must be a number");
    if (alpha.is_number()) alpha_ = alpha.get<double>();
    if (field("use_rslora").is_boolean()) rank_stabilized_ = field("use_rslora").get<bool>();
    const auto patterns = field("alpha_pattern");
    if (!patterns.is_object()) return;
    for (const auto& [pattern, alpha] : patterns.items()) {
        std::string plain = pattern;
        for (size_t at = plain.find("\\."); at != std::string::npos; at = plain.find("\\.", at)) plain.erase(at, 1);
        if (!alpha.is_number() || plain.find_first_of("^$*+?()[]{}|\\", plain.starts_with('^')) != std::string::npos) {
            fail(DIFFUSIONZ_E_LORA, name, ": alpha_pattern has '", pattern,
                 "'; supported are a module's name or its end, each with a number");
        }
        patterns_.emplace_back(std::move(plain), alpha.get<double>());
    }
}

}  // namespace diffusionz
