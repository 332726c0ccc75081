// A file mapped read-only into memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string_view>

namespace diffusionz {

class MappedFile {
public:
    // Fails with `status` when the file is missing, unreadable, empty or no regular file; read() fails with it, too.
    MappedFile(const std::filesystem::path& path, int32_t status);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const uint8_t* data() const { return data_; }
    size_t size_bytes() const { return size_bytes_; }
    std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_bytes_}; }
    const std::filesystem::path& path() const { return path_; }

    // Copies bytes of the file without touching the mapping's pages. Fails with `status` when they cannot be read any more.
    void read(size_t offset, size_t size_bytes, void* to) const;

    // Tells the kernel that the pages are not needed soon. They stay readable: the file backs them.
    void release_pages() const;

private:
    std::filesystem::path path_;
    int32_t status_;
    int descriptor_;
    const uint8_t* data_ = nullptr;
    size_t size_bytes_ = 0;
};

}  // namespace diffusionz
