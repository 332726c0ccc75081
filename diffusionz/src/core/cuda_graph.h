// CUDA graphs, and the streams that they are recorded on. In a build without CUDA, and on the CPU, nothing here does anything.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>

#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace diffusionz {

// A stream of its own for one engine: graphs cannot be recorded on the default stream, and engines should not wait for each
// other.
class WorkStream {
public:
    explicit WorkStream(at::Device device);

    // Sends the work of this thread to the stream for its lifetime.
    class Scope {
    public:
        explicit Scope(const WorkStream& stream);

    private:
        std::optional<c10::StreamGuard> guard_;
    };

    // Waits for what was sent so far.
    void synchronize() const;

private:
    std::optional<c10::Stream> stream_;
};

// Device memory that graphs take their intermediate results from. Graphs of one pool must not run at the same time, and what one
// leaves in the pool the next may overwrite: inputs and results live outside.
class GraphPool {
public:
    GraphPool();

private:
    friend class CudaGraph;
    c10::MempoolId_t id_{0, 0};
};

class CudaGraph {
public:
    CudaGraph();
    ~CudaGraph();
    CudaGraph(CudaGraph&&) noexcept;
    CudaGraph& operator=(CudaGraph&&) noexcept;

    // Records what `work` sends to the current stream of `device`, without running it. `work` must have run before, and must not
    // wait for the device. Libraries make handles at their first call on a thread, which cannot be done while recording: where
    // `work` ran on another thread, `ran_on`, it is run once more first. What it throws comes through, and nothing is recorded.
    void capture(at::Device device, const std::function<void()>& work, std::thread::id ran_on, const GraphPool& pool);
    // Runs it on the current stream.
    void replay();
    bool captured() const { return impl_ != nullptr; }

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

// Functions of tensors that run as graphs from their second call on: the first one is also what readies the libraries.
class GraphCache {
public:
    using Function = std::function<at::Tensor(const std::vector<at::Tensor>&)>;

    // Without `enabled`, and on the CPU, every call runs as it is written.
    GraphCache(at::Device device, bool enabled);

    // work(inputs), by a graph where there is one for `key` and the inputs' shapes. `key` stands for the function and for all
    // that it reads beside its inputs; `make` gives the function, and is only called where it is needed. Graphs keep the
    // function, hold copies of the inputs, and compute the same bits as the function does. The result is the caller's.
    at::Tensor run(const std::string& key, const std::vector<at::Tensor>& inputs, const std::function<Function()>& make);

    // Forgets every graph, and gives their memory back.
    void clear() { entries_.clear(); }

private:
    struct Entry {
        std::string key;
        Function work;
        std::vector<at::Tensor> inputs;
        at::Tensor output;
        CudaGraph graph;
        bool too_large = false;  // there was no memory to record it in
        std::thread::id ran_on = std::this_thread::get_id();
    };

    at::Device device_;
    bool enabled_;
    GraphPool pool_;
    std::list<Entry> entries_;  // the last used first
};

}  // namespace diffusionz
