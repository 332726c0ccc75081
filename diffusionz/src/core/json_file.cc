#include "core/json_file.h"

#include "core/json_depth.h"
#include "core/mapped_file.h"

namespace diffusionz {
namespace {

template <class Number>
std::string range_text(const char* kind, Number min, Number max) {
    return concat(kind, " from ", min, " to ", max);
}

}  // namespace

JsonFile JsonFile::load(const std::filesystem::path& path, int32_t status) {
    const MappedFile file(path, status);
    JsonFile json(path.string());
    json.status_ = status;
    const std::string_view text = file.text();
    if (json_too_deep(text)) fail(status, path.string(), ": nested deeper than ", kJsonDepthMax, " levels");
    json.object_ = nlohmann::json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
    if (!json.object_.is_object()) fail(status, path.string(), ": not a JSON object");
    return json;
}

void JsonFile::refuse(const std::string& key, const std::string& allowed) const {
    std::string value = object_[key].dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    if (value.size() > 80) value = value.substr(0, 77) + "...";
    fail(status_, name_, ": ", key, " is ", value, "; it must be ", allowed);
}

int64_t JsonFile::integer(const std::string& key, int64_t fallback, int64_t min, int64_t max) const {
    if (!has(key)) return fallback;
    const auto& value = object_[key];
    if (!value.is_number_integer() || value.get<int64_t>() < min || value.get<int64_t>() > max)
        refuse(key, range_text("an integer", min, max));
    return value.get<int64_t>();
}

double JsonFile::number(const std::string& key, double fallback, double min, double max) const {
    if (!has(key)) return fallback;
    const auto& value = object_[key];
    if (!value.is_number() || !(value.get<double>() >= min && value.get<double>() <= max))
        refuse(key, range_text("a number", min, max));
    return value.get<double>();
}

bool JsonFile::boolean(const std::string& key, bool fallback) const {
    if (!has(key)) return fallback;
    if (!object_[key].is_boolean()) refuse(key, "true or false");
    return object_[key].get<bool>();
}

std::string JsonFile::text(const std::string& key, const std::string& fallback) const {
    if (!has(key)) return fallback;
    if (!object_[key].is_string()) refuse(key, "a string");
    return object_[key].get<std::string>();
}

std::vector<int64_t> JsonFile::integers(const std::string& key, const std::vector<int64_t>& fallback, int64_t min,
                                        int64_t max) const {
    if (!has(key)) return fallback;
    std::vector<int64_t> values;
    if (!object_[key].is_array() || object_[key].size() > 1024) refuse(key, "a list of integers");
    for (const auto& value : object_[key]) {
        if (!value.is_number_integer() || value.get<int64_t>() < min || value.get<int64_t>() > max)
            refuse(key, range_text("a list of integers", min, max));
        values.push_back(value.get<int64_t>());
    }
    return values;
}

std::vector<double> JsonFile::numbers(const std::string& key, double min, double max) const {
    std::vector<double> values;
    if (!has(key)) return values;
    if (!object_[key].is_array() || object_[key].size() > 1024) refuse(key, "a list of numbers");
    for (const auto& value : object_[key]) {
        if (!value.is_number() || !(value.get<double>() >= min && value.get<double>() <= max))
            refuse(key, range_text("a list of numbers", min, max));
        values.push_back(value.get<double>());
    }
    return values;
}

JsonFile JsonFile::child(const std::string& key) const {
    JsonFile json(name_ + ", " + key);
    json.status_ = status_;
    if (has(key)) {
        if (!object_[key].is_object()) refuse(key, "an object");
        json.object_ = object_[key];
    }
    return json;
}

}  // namespace diffusionz
