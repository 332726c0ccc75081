#include "core/checkpoint.h"

#include <algorithm>
#include <set>

#include "core/error.h"
#include "core/json_file.h"

namespace diffusionz {
namespace fs = std::filesystem;
namespace {

bool ends_with(const std::string& text, const std::string& end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Files of `folder` whose name ends so, sorted.
std::vector<fs::path> files_ending(const fs::path& folder, const std::string& end) {
    std::vector<fs::path> found;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(folder, error)) {
        if (ends_with(entry.path().filename().string(), end)) found.push_back(entry.path());
    }
    std::sort(found.begin(), found.end());
    return found;
}

}  // namespace

Checkpoint Checkpoint::from_folder(const fs::path& folder) {
    if (!fs::is_directory(folder))
        fail(DIFFUSIONZ_E_MODEL, folder.string(), ": no such folder; a model in the diffusers layout has one");
    Checkpoint checkpoint;
    checkpoint.name_ = folder.string();
    const auto indexes = files_ending(folder, ".safetensors.index.json");
    const auto files = files_ending(folder, ".safetensors");
    if (indexes.empty()) {
        if (files.empty()) fail(DIFFUSIONZ_E_MODEL, folder.string(), ": no .safetensors file in it");
        if (files.size() > 1)
            fail(DIFFUSIONZ_E_MODEL, folder.string(), ": ", files.size(),
                 " .safetensors files and no *.safetensors.index.json; which is meant is unclear");
        checkpoint.add_file(files[0], DIFFUSIONZ_E_MODEL);
        return checkpoint;
    }
    const JsonFile index = JsonFile::load(indexes[0]);
    std::set<std::string> shards;
    const JsonFile map = index.child("weight_map");
    for (const auto& [tensor, shard] : map.object().items()) {
        // An index may name its neighbours only: anything else could read outside the model's folder.
        if (!shard.is_string() || shard.get<std::string>().empty() ||
            fs::path(shard.get<std::string>()).filename() != shard.get<std::string>() || shard == "." || shard == "..") {
            fail(DIFFUSIONZ_E_MODEL, index.name(), ": weight_map sends '", tensor, "' to ", shard.dump(),
                 "; it must be a file name of the same folder");
        }
        shards.insert(shard.get<std::string>());
    }
    if (shards.empty()) fail(DIFFUSIONZ_E_MODEL, index.name(), ": weight_map is missing or empty");
    for (const auto& shard : shards) checkpoint.add_file(folder / shard, DIFFUSIONZ_E_MODEL);
    for (const auto& [tensor, shard] : map.object().items()) {
        if (!checkpoint.has(tensor))
            fail(DIFFUSIONZ_E_MODEL, index.name(), ": '", tensor, "' is not in ", shard.get<std::string>());
    }
    return checkpoint;
}

Checkpoint Checkpoint::from_file(const fs::path& file, const std::string& prefix, int32_t status) {
    Checkpoint checkpoint;
    checkpoint.name_ = file.string();
    checkpoint.add_file(file, status);
    if (!prefix.empty()) {
        checkpoint.rename(
            [&](const std::string& name) { return name.rfind(prefix, 0) == 0 ? name.substr(prefix.size()) : std::string(); });
    }
    return checkpoint;
}

const TensorView& Checkpoint::at(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end())
        fail(DIFFUSIONZ_E_MODEL, name_, ": tensor '", name, "' is missing; damaged, or a model of another architecture");
    return found->second;
}

int64_t Checkpoint::extent(const std::string& name, size_t dimension) const {
    const std::vector<int64_t>& shape = at(name).shape;
    if (dimension >= shape.size() || shape[dimension] < 1)
        fail(DIFFUSIONZ_E_MODEL, name_, ": tensor '", name, "' is ", shape_text(shape), "; it must have ", dimension + 1,
             " dimensions or more, none of them empty; damaged, or a model of another architecture");
    return shape[dimension];
}

bool Checkpoint::has_below(const std::string& prefix) const {
    const auto found = tensors_.lower_bound(prefix);
    return found != tensors_.end() && found->first.starts_with(prefix);
}

const MappedFile& Checkpoint::file_of(const TensorView& view) const {
    for (const auto& file : files_) {
        if (view.data >= file->data() && view.data < file->data() + file->size_bytes()) return *file;
    }
    fail(DIFFUSIONZ_E_INTERNAL, name_, ": a tensor that lies in none of its files");
}

void Checkpoint::release_pages() const {
    for (const auto& file : files_) file->release_pages();
}

void Checkpoint::strip_prefix(const std::string& prefix) {
    rename([&](const std::string& name) { return name.rfind(prefix, 0) == 0 ? name.substr(prefix.size()) : name; });
}

void Checkpoint::rename(const std::function<std::string(const std::string&)>& new_name) {
    std::map<std::string, TensorView> renamed;
    for (auto& [name, view] : tensors_) {
        std::string target = new_name(name);
        if (!target.empty()) renamed[std::move(target)] = std::move(view);
    }
    tensors_ = std::move(renamed);
}

void Checkpoint::add_file(const fs::path& path, int32_t status) {
    files_.push_back(std::make_shared<MappedFile>(path, status));
    SafetensorsFile file = read_safetensors(files_.back()->text(), path.string(), status);
    for (auto& [name, view] : file.tensors) tensors_[name] = std::move(view);
    metadata_.merge(file.metadata);
}

}  // namespace diffusionz
