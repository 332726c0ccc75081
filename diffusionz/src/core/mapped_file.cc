#include "core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/error.h"

namespace diffusionz {

MappedFile::MappedFile(const std::filesystem::path& path, int32_t status) : path_(path) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) fail(status, path.string(), ": ", std::strerror(errno));
    struct stat info{};
    if (::fstat(descriptor, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size == 0) {
        ::close(descriptor);
        fail(status, path.string(), S_ISREG(info.st_mode) ? ": the file is empty" : ": not a regular file");
    }
    size_bytes_ = static_cast<size_t>(info.st_size);
    void* mapped = ::mmap(nullptr, size_bytes_, PROT_READ, MAP_PRIVATE, descriptor, 0);
    const int error = errno;
    ::close(descriptor);
    if (mapped == MAP_FAILED) fail(status, path.string(), ": cannot be mapped: ", std::strerror(error));
    data_ = static_cast<const uint8_t*>(mapped);
}

MappedFile::~MappedFile() { ::munmap(const_cast<uint8_t*>(data_), size_bytes_); }

void MappedFile::release_pages() const { ::madvise(const_cast<uint8_t*>(data_), size_bytes_, MADV_DONTNEED); }

}  // namespace diffusionz
