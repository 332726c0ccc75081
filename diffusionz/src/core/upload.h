// Carries tensors from a file to a CUDA device: threads read pieces into pinned buffers, and the device fetches each piece while
// the next ones are read. The host holds the buffers, and no second copy of the file.
#pragma once

#include <ATen/core/Tensor.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/mapped_file.h"

namespace diffusionz {

class Upload {
public:
    // Fails with E_DEVICE in a build without CUDA.
    explicit Upload(at::Device device);
    ~Upload();  // waits for what is on its way
    Upload(const Upload&) = delete;
    Upload& operator=(const Upload&) = delete;

    // Memory to copy to, and for the current stream to use. It comes from a pool of its own: were it the current stream's, what
    // is made of a tensor that is then dropped would settle in the holes, and they could never be given back.
    at::Tensor allocate(at::IntArrayRef shape, at::ScalarType dtype) const;
    // Copies `size_bytes` of `file` from `offset` to such memory. Returns once the copies are sent; the current stream waits for
    // them. Fails as the file's read does.
    void copy(const MappedFile& file, size_t offset, size_t size_bytes, void* to);

private:
    struct Piece {
        const MappedFile* file;
        size_t offset, size_bytes;
        uint8_t* to;
    };
    struct Device;  // the stream and the buffers
    void work(size_t worker, const std::stop_token& stop);

    std::unique_ptr<Device> device_;
    std::mutex caller_;  // one at a time
    std::mutex mutex_;
    std::condition_variable_any changed_;
    std::deque<Piece> pieces_;
    size_t unsent_ = 0;
    std::exception_ptr error_;
    std::vector<std::jthread> workers_;  // last: they end before what they use
};

}  // namespace diffusionz
