#include "core/model_cache.h"

#include <algorithm>
#include <vector>

#include "core/error.h"

namespace diffusionz {
namespace fs = std::filesystem;

std::string model_key(const fs::path& path, const Placement& placement) {
    std::vector<std::string> files;
    const auto add = [&](const fs::path& file) {
        std::error_code error;
        const auto size = fs::file_size(file, error);
        files.push_back(concat(file.string(), ' ', size, ' ', fs::last_write_time(file, error).time_since_epoch().count()));
    };
    std::error_code error;
    const fs::path canonical = fs::canonical(path, error);
    if (error) fail(DIFFUSIONZ_E_MODEL, path.string(), ": ", error.message());
    if (fs::is_regular_file(canonical, error)) add(canonical);
    // Folders that are links are followed: models that consist of those alone would all have one key.
    constexpr auto kLinks = fs::directory_options::follow_directory_symlink;
    for (fs::recursive_directory_iterator entry(canonical, kLinks, error), end; !error && entry != end; entry.increment(error)) {
        if (entry.depth() > 0) entry.disable_recursion_pending();
        if (entry->is_regular_file(error)) add(entry->path());
    }
    std::sort(files.begin(), files.end());
    std::string key =
        concat(placement.device.str(), ' ', static_cast<int>(placement.dtype), ' ', static_cast<int>(placement.products), '\n');
    for (const std::string& file : files) key += file + '\n';
    return key;
}

}  // namespace diffusionz
