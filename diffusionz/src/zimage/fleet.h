// What stands behind a context of the C ABI: an engine a device, and the queue of the calls that they draw.
#pragma once

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "zimage/engine.h"

namespace diffusionz {

class Fleet {
public:
    // `placements`: at least one; one that is there twice is two engines that share a model. max_vram_bytes 0 is no limit.
    Fleet(const std::filesystem::path& path, const std::vector<Placement>& placements, bool cuda_graphs, int64_t max_vram_bytes);

    // Called once for each picture, by the thread that drew it, when its device draws the next one already. Threads may be
    // several.
    using Finished = std::function<void(size_t index, Picture picture)>;

    // Draws every request. Calls are served in the order of their arrival: each engine takes the next picture of the first call
    // that has one left. Requests have passed check(). The first error of any picture ends the call and is thrown.
    void generate(std::span<const DiffusionZRequest> requests, Task& task, const Finished& finished);

    void check(const DiffusionZRequest& request) const { engines_[0]->check(request); }
    std::string metadata(const DiffusionZRequest& request) const { return engines_[0]->metadata(request); }
    std::string info() const;
    // Everything but struct_size.
    DiffusionZMemoryInfo memory();

    // These take a place in the queue, and find every engine idle.
    void load_lora(const std::filesystem::path& path, double weight);
    void unload_lora();

private:
    struct Call {
        size_t next = 0, count = 0;  // pictures that engines took, and all
        std::exception_ptr error;
    };
    struct Turn {
        size_t picture, engine;
    };

    // Draws pictures of a call until none is left.
    void serve(Call& call, std::span<const DiffusionZRequest> requests, Task& task, const Finished& finished);
    // The call's next picture and an engine for it, once the call is the first and an engine idle; nothing when none is left.
    // Fails with E_CANCELLED.
    std::optional<Turn> take_turn(Call& call, const Task& task);
    // Draws the picture, and lets the engine go.
    Picture draw(const Turn& turn, const DiffusionZRequest& request, Task& task);
    void leave(const Call& call);  // the queue; with the mutex held
    void alone(const std::function<void()>& work);

    std::vector<std::unique_ptr<Engine>> engines_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<const Call*> calls_;  // that have pictures left
    std::vector<bool> busy_;         // an engine each
};

}  // namespace diffusionz
