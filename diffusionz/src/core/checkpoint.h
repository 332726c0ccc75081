// The tensors of one component of a model (transformer, text encoder, VAE), by name, in memory-mapped safetensors files.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/mapped_file.h"
#include "core/safetensors.h"

namespace diffusionz {

class Checkpoint {
public:
    // A folder with one safetensors file, or with shards and their *.safetensors.index.json. Fails with E_MODEL.
    static Checkpoint from_folder(const std::filesystem::path& folder);
    // One file. Tensors are kept whose name begins with `prefix`, which is taken off.
    static Checkpoint from_file(const std::filesystem::path& file, const std::string& prefix = "",
                                int32_t status = DIFFUSIONZ_E_MODEL);

    bool has(const std::string& name) const { return tensors_.count(name) != 0; }
    // Fails with E_MODEL when there is none.
    const TensorView& at(const std::string& name) const;
    // The tensor's extent in `dimension`. Fails with E_MODEL when it has none or an empty one.
    int64_t extent(const std::string& name, size_t dimension) const;
    // Whether a tensor's name begins with `prefix`.
    bool has_below(const std::string& prefix) const;
    const std::map<std::string, TensorView>& tensors() const { return tensors_; }
    // The metadata of the files' headers.
    const std::map<std::string, std::string>& metadata() const { return metadata_; }
    // Where it came from, for messages.
    const std::string& name() const { return name_; }

    // The file that `view`, of this checkpoint, points into.
    const MappedFile& file_of(const TensorView& view) const;

    // Tells the kernel that what was read so far is not needed soon: called once a layer has its own copy, it keeps a load from
    // holding the model twice. Tensors that still point into the files stay readable.
    void release_pages() const;

    // Takes `prefix` off every name that begins with it.
    void strip_prefix(const std::string& prefix);
    // Renames each tensor; an empty new name drops it.
    void rename(const std::function<std::string(const std::string&)>& new_name);
    void insert(const std::string& name, TensorView view) { tensors_[name] = std::move(view); }
    void erase(const std::string& name) { tensors_.erase(name); }

private:
    void add_file(const std::filesystem::path& path, int32_t status);

    std::string name_;
    std::vector<std::shared_ptr<MappedFile>> files_;
    std::map<std::string, TensorView> tensors_;
    std::map<std::string, std::string> metadata_;
};

}  // namespace diffusionz
