#include "core/cuda_graph.h"

#include <ATen/ops/clone.h>

#include <algorithm>

#include "core/device.h"
#include "core/error.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace diffusionz {
namespace {

// Each holds its intermediate results' addresses, not their memory, which all share.
constexpr size_t kGraphsMax = 24;

}  // namespace

#ifdef DIFFUSIONZ_WITH_CUDA

WorkStream::WorkStream(at::Device device) {
    if (device.is_cuda()) stream_ = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index()).unwrap();
}

GraphPool::GraphPool() : id_(at::cuda::graph_pool_handle()) {}

struct CudaGraph::Impl {
    at::cuda::CUDAGraph graph;
};

void CudaGraph::capture(at::Device device, const std::function<void()>& work, std::thread::id ran_on, const GraphPool& pool) {
    impl_.reset();
    const c10::cuda::CUDAGuard guard(device);
    if (ran_on != std::this_thread::get_id()) work();
    auto impl = std::make_unique<Impl>();
    // Other threads' engines may allocate and launch meanwhile: only what this thread does is of the graph.
    impl->graph.capture_begin(pool.id_, cudaStreamCaptureModeThreadLocal);
    try {
        work();
    } catch (...) {
        // The stream has to leave the capture before anything else can be sent to it; what went wrong is already known.
        try {
            impl->graph.capture_end();
        } catch (const std::exception&) {
        }
        throw;
    }
    impl->graph.capture_end();
    impl_ = std::move(impl);
}

void CudaGraph::replay() { impl_->graph.replay(); }

#else

WorkStream::WorkStream(at::Device) {}
GraphPool::GraphPool() = default;
struct CudaGraph::Impl {};
void CudaGraph::capture(at::Device device, const std::function<void()>&, std::thread::id, const GraphPool&) {
    fail(DIFFUSIONZ_E_INTERNAL, "a CUDA graph was asked for on ", device.str(), " in a build without CUDA");
}
void CudaGraph::replay() {}

#endif

WorkStream::Scope::Scope(const WorkStream& stream) {
    if (stream.stream_) guard_.emplace(*stream.stream_);
}

void WorkStream::synchronize() const {
    if (stream_) stream_->synchronize();
}

CudaGraph::CudaGraph() = default;
CudaGraph::~CudaGraph() = default;
CudaGraph::CudaGraph(CudaGraph&&) noexcept = default;
CudaGraph& CudaGraph::operator=(CudaGraph&&) noexcept = default;

GraphCache::GraphCache(at::Device device, bool enabled) : device_(device), enabled_(enabled && device.is_cuda()) {}

at::Tensor GraphCache::run(const std::string& key, const std::vector<at::Tensor>& inputs, const std::function<Function()>& make) {
    if (!enabled_) return make()(inputs);
    std::string full_key = key;
    for (const at::Tensor& input : inputs) {
        full_key += '|';
        for (const int64_t size : input.sizes()) full_key += std::to_string(size) + ',';
    }
    auto entry = std::find_if(entries_.begin(), entries_.end(), [&](const Entry& other) { return other.key == full_key; });
    if (entry == entries_.end()) {
        if (entries_.size() == kGraphsMax) entries_.pop_back();
        Function work = make();
        const at::Tensor output = work(inputs);  // what fails is not kept: only what has run can be recorded
        entries_.push_front({full_key, std::move(work), {}, {}, {}});
        return output;
    }
    entries_.splice(entries_.begin(), entries_, entry);
    if (entry->too_large) return entry->work(inputs);
    if (!entry->graph.captured()) {
        // LibTorch refuses a pool whose last graph is gone.
        if (std::none_of(entries_.begin(), entries_.end(), [](const Entry& other) { return other.graph.captured(); }))
            pool_ = GraphPool();
        release_kept_memory();  // the pool takes none of it
        try {
            std::vector<at::Tensor> kept;
            for (const at::Tensor& input : inputs) kept.push_back(input.clone());
            entry->graph.capture(device_, [&] { entry->output = entry->work(kept); }, entry->ran_on, pool_);
            entry->inputs = std::move(kept);
        } catch (const c10::OutOfMemoryError&) {
            entry->too_large = true;
            entry->output.reset();
            release_kept_memory();
            return entry->work(inputs);
        }
    } else {
        for (size_t i = 0; i < inputs.size(); ++i) entry->inputs[i].copy_(inputs[i], /*non_blocking=*/true);
    }
    entry->graph.replay();
    return entry->output.clone();
}

}  // namespace diffusionz
