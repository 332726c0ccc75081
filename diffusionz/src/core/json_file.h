// A JSON object of a model's or an adapter's folder, read with checks: every accessor fails with the file's status, naming file,
// key, value and what is allowed.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "core/error.h"

namespace diffusionz {

class JsonFile {
public:
    static JsonFile load(const std::filesystem::path& path, int32_t status = DIFFUSIONZ_E_MODEL);
    // No file: every accessor gives its fallback. `name` is for messages.
    explicit JsonFile(std::string name) : name_(std::move(name)), object_(nlohmann::json::object()) {}

    bool has(const std::string& key) const { return object_.contains(key) && !object_[key].is_null(); }
    int64_t integer(const std::string& key, int64_t fallback, int64_t min, int64_t max) const;
    double number(const std::string& key, double fallback, double min, double max) const;
    bool boolean(const std::string& key, bool fallback) const;
    std::string text(const std::string& key, const std::string& fallback) const;
    std::vector<int64_t> integers(const std::string& key, const std::vector<int64_t>& fallback, int64_t min, int64_t max) const;
    std::vector<double> numbers(const std::string& key, double min, double max) const;
    // The object under `key`, empty when there is none.
    JsonFile child(const std::string& key) const;
    const nlohmann::json& object() const { return object_; }
    const std::string& name() const { return name_; }

private:
    [[noreturn]] void refuse(const std::string& key, const std::string& allowed) const;

    std::string name_;
    nlohmann::json object_;
    int32_t status_ = DIFFUSIONZ_E_MODEL;
};

}  // namespace diffusionz
