#include "core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "core/error.h"

namespace diffusionz {

MappedFile::MappedFile(const std::filesystem::path& path, int32_t status)
    // O_NONBLOCK: a pipe that nobody writes to is opened at once, and refused.
    : path_(path), status_(status), descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (descriptor_ < 0) fail(status, path.string(), ": ", std::strerror(errno));
    struct stat info{};
    if (::fstat(descriptor_, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size == 0) {
        ::close(descriptor_);
        fail(status, path.string(), S_ISREG(info.st_mode) ? ": the file is empty" : ": not a regular file");
    }
    size_bytes_ = static_cast<size_t>(info.st_size);
    void* mapped = ::mmap(nullptr, size_bytes_, PROT_READ, MAP_PRIVATE, descriptor_, 0);
    if (mapped == MAP_FAILED) {
        const int error = errno;
        ::close(descriptor_);
        fail(status, path.string(), ": cannot be mapped: ", std::strerror(error));
    }
    data_ = static_cast<const uint8_t*>(mapped);
}

MappedFile::~MappedFile() {
    ::munmap(const_cast<uint8_t*>(data_), size_bytes_);
    ::close(descriptor_);
}

void MappedFile::read(size_t offset, size_t size_bytes, void* to) const {
    for (size_t done = 0; done < size_bytes;) {
        const ssize_t count =
            ::pread(descriptor_, static_cast<uint8_t*>(to) + done, size_bytes - done, static_cast<off_t>(offset + done));
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) {
            fail(status_, path_.string(), ": cannot be read at byte ", offset + done, ": ",
                 count < 0 ? std::strerror(errno) : "it was cut short since it was opened");
        }
        done += static_cast<size_t>(count);
    }
}

void MappedFile::release_pages() const { ::madvise(const_cast<uint8_t*>(data_), size_bytes_, MADV_DONTNEED); }

}  // namespace diffusionz
