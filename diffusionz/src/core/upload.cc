#include "core/upload.h"

#include "core/error.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#endif

namespace diffusionz {

#ifdef DIFFUSIONZ_WITH_CUDA

namespace {

constexpr size_t kPieceBytes = size_t{4} << 20;
constexpr size_t kWorkersMax = 8;

}  // namespace

// Each worker has two buffers: one is read into while the device fetches the other.
struct Upload::Device {
    struct Buffer {
        uint8_t* bytes = nullptr;
        cudaEvent_t fetched = nullptr;
    };

    Device(at::Device device, size_t workers)
        : index(device.index()), stream(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, index)), buffers(2 * workers) {
        const c10::cuda::CUDAGuard guard(index);
        C10_CUDA_CHECK(cudaEventCreateWithFlags(&begun, cudaEventDisableTiming));
        C10_CUDA_CHECK(cudaEventCreateWithFlags(&sent, cudaEventDisableTiming));
        C10_CUDA_CHECK(cudaHostAlloc(reinterpret_cast<void**>(&arena), buffers.size() * kPieceBytes, cudaHostAllocDefault));
        for (size_t i = 0; i < buffers.size(); ++i) {
            buffers[i].bytes = arena + i * kPieceBytes;
            C10_CUDA_CHECK(cudaEventCreateWithFlags(&buffers[i].fetched, cudaEventDisableTiming));
        }
    }
    ~Device() {
        const c10::cuda::CUDAGuard guard(index);
        cudaStreamSynchronize(stream.stream());  // the last pieces are still being fetched
        for (const Buffer& buffer : buffers) cudaEventDestroy(buffer.fetched);
        cudaFreeHost(arena);
        cudaEventDestroy(sent);
        cudaEventDestroy(begun);
    }

    c10::DeviceIndex index;
    c10::cuda::CUDAStream stream;
    cudaEvent_t begun = nullptr, sent = nullptr;
    uint8_t* arena = nullptr;
    std::vector<Buffer> buffers;
};

Upload::Upload(at::Device device) {
    const size_t workers = std::min<size_t>(std::max(1u, std::thread::hardware_concurrency()), kWorkersMax);
    device_ = std::make_unique<Device>(device, workers);
    for (size_t i = 0; i < workers; ++i) workers_.emplace_back([this, i](const std::stop_token& stop) { work(i, stop); });
}

at::Tensor Upload::allocate(at::IntArrayRef shape, at::ScalarType dtype) const {
    const auto current = c10::cuda::getCurrentCUDAStream(device_->index);
    const c10::cuda::CUDAStreamGuard guard(device_->stream);
    const at::Tensor memory = at::empty(shape, at::TensorOptions().device(at::kCUDA, device_->index).dtype(dtype));
    c10::cuda::CUDACachingAllocator::recordStream(memory.storage().data_ptr(), current);
    return memory;
}

void Upload::copy(const MappedFile& file, size_t offset, size_t size_bytes, void* to) {
    const std::lock_guard caller(caller_);
    const cudaStream_t current = c10::cuda::getCurrentCUDAStream(device_->index).stream();
    // The memory may still be read by what the current stream has yet to do.
    C10_CUDA_CHECK(cudaEventRecord(device_->begun, current));
    C10_CUDA_CHECK(cudaStreamWaitEvent(device_->stream.stream(), device_->begun));
    std::unique_lock lock(mutex_);
    for (size_t at = 0; at < size_bytes; at += kPieceBytes) {
        pieces_.push_back({&file, offset + at, std::min(kPieceBytes, size_bytes - at), static_cast<uint8_t*>(to) + at});
        ++unsent_;
    }
    changed_.notify_all();
    changed_.wait(lock, [&] { return unsent_ == 0; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    C10_CUDA_CHECK(cudaEventRecord(device_->sent, device_->stream.stream()));
    C10_CUDA_CHECK(cudaStreamWaitEvent(current, device_->sent));
}

void Upload::work(size_t worker, const std::stop_token& stop) {
    const c10::cuda::CUDAGuard guard(device_->index);
    for (size_t turn = 0;; turn ^= 1) {
        Piece piece;
        {
            std::unique_lock lock(mutex_);
            if (!changed_.wait(lock, stop, [&] { return !pieces_.empty(); })) return;
            piece = pieces_.front();
            pieces_.pop_front();
        }
        std::exception_ptr error;
        try {
            const Device::Buffer& buffer = device_->buffers[2 * worker + turn];
            C10_CUDA_CHECK(cudaEventSynchronize(buffer.fetched));
            piece.file->read(piece.offset, piece.size_bytes, buffer.bytes);
            const cudaStream_t stream = device_->stream.stream();
            C10_CUDA_CHECK(cudaMemcpyAsync(piece.to, buffer.bytes, piece.size_bytes, cudaMemcpyHostToDevice, stream));
            C10_CUDA_CHECK(cudaEventRecord(buffer.fetched, stream));
        } catch (...) {  // an exception cannot leave a thread: copy() throws it
            error = std::current_exception();
        }
        {
            const std::lock_guard lock(mutex_);
            if (error && !error_) error_ = error;
            --unsent_;
        }
        changed_.notify_all();
    }
}

#else

struct Upload::Device {};
Upload::Upload(at::Device device) {
    fail(DIFFUSIONZ_E_DEVICE, "an upload to ", device.str(), " was asked for in a build without CUDA");
}
at::Tensor Upload::allocate(at::IntArrayRef, at::ScalarType) const { return {}; }
void Upload::copy(const MappedFile&, size_t, size_t, void*) {}

#endif

Upload::~Upload() = default;

}  // namespace diffusionz
