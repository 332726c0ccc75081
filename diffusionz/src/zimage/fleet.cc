#include "zimage/fleet.h"

#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <future>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "core/device.h"
#include "core/threads.h"

namespace diffusionz {
namespace {

// A cancel does not know whom to wake.
constexpr std::chrono::milliseconds kCancelPoll{20};

}  // namespace

Fleet::Fleet(const std::filesystem::path& path, const std::vector<Placement>& placements, bool cuda_graphs,
             int64_t max_vram_bytes)
    : busy_(placements.size()) {
    // Side by side: devices do not wait for each other's weights.
    std::vector<std::future<std::unique_ptr<Engine>>> loading;
    for (const Placement& placement : placements) {
        loading.push_back(std::async(placements.size() == 1 ? std::launch::deferred : std::launch::async, [=] {
            apply_threads();
            const c10::OptionalDeviceGuard guard(placement.device);
            return std::make_unique<Engine>(path, placement, cuda_graphs, max_vram_bytes);
        }));
    }
    for (auto& engine : loading) engines_.push_back(engine.get());
}

void Fleet::generate(std::span<const DiffusionZRequest> requests, Task& task, const Finished& finished) {
    int32_t steps = 0;
    for (const DiffusionZRequest& request : requests) steps += Engine::steps_of(request);
    task.set_step_count(steps);
    Call call;
    call.count = requests.size();
    {
        const std::lock_guard lock(mutex_);
        calls_.push_back(&call);
    }
    {
        std::vector<std::jthread> others;
        for (size_t i = 1; i < std::min(engines_.size(), requests.size()); ++i) {
            others.emplace_back([&] {
                apply_threads();
                serve(call, requests, task, finished);
            });
        }
        serve(call, requests, task, finished);
    }
    if (call.error) std::rethrow_exception(call.error);
}

void Fleet::serve(Call& call, std::span<const DiffusionZRequest> requests, Task& task, const Finished& finished) {
    try {
        while (const std::optional<Turn> turn = take_turn(call, task)) {
            Picture picture = draw(*turn, requests[turn->picture], task);
            task.add_image();
            finished(turn->picture, std::move(picture));
        }
    } catch (...) {  // nothing may leave a thread; generate() throws it
        const std::lock_guard lock(mutex_);
        if (!call.error) call.error = std::current_exception();
        leave(call);
        task.cancel();  // the call's other pictures are of no use any more
    }
}

Picture Fleet::draw(const Turn& turn, const DiffusionZRequest& request, Task& task) {
    Engine& engine = *engines_[turn.engine];
    const auto give_back = [&](const void*) {
        const std::lock_guard lock(mutex_);
        busy_[turn.engine] = false;
        changed_.notify_all();
    };
    const std::unique_ptr<const Turn, decltype(give_back)> taken(&turn, give_back);
    try {
        return engine.draw(request, task, static_cast<int32_t>(turn.picture));
    } catch (const c10::OutOfMemoryError&) {
        engine.forget_graphs();  // their memory is what the next call may be short of
        throw;
    }
}

std::optional<Fleet::Turn> Fleet::take_turn(Call& call, const Task& task) {
    std::unique_lock lock(mutex_);
    while (call.next < call.count && !call.error) {
        task.check();
        const auto idle = std::find(busy_.begin(), busy_.end(), false);
        if (calls_.front() == &call && idle != busy_.end()) {
            const Turn turn{call.next++, static_cast<size_t>(idle - busy_.begin())};
            *idle = true;
            if (call.next == call.count) leave(call);
            return turn;
        }
        changed_.wait_for(lock, kCancelPoll);
    }
    return {};
}

void Fleet::leave(const Call& call) {
    std::erase(calls_, &call);
    changed_.notify_all();
}

void Fleet::alone(const std::function<void()>& work) {
    const Call call;
    {
        std::unique_lock lock(mutex_);
        calls_.push_back(&call);
        changed_.wait(lock,
                      [&] { return calls_.front() == &call && std::find(busy_.begin(), busy_.end(), true) == busy_.end(); });
    }
    try {
        work();
    } catch (...) {
        const std::lock_guard lock(mutex_);
        leave(call);
        throw;
    }
    const std::lock_guard lock(mutex_);
    leave(call);
}

void Fleet::load_lora(const std::filesystem::path& path, double weight) {
    alone([&] {
        for (const auto& engine : engines_) engine->load_lora(path, weight);
    });
}

void Fleet::unload_lora() {
    alone([&] {
        for (const auto& engine : engines_) engine->unload_lora();
    });
}

std::string Fleet::info() const {
    auto json = nlohmann::ordered_json::parse(engines_[0]->info());
    std::string devices;
    for (const auto& engine : engines_) devices += (devices.empty() ? "" : ",") + engine->model().placement().device.str();
    json["device"] = devices;
    return json.dump();
}

DiffusionZMemoryInfo Fleet::memory() {
    DiffusionZMemoryInfo info{};
    std::set<const Model*> models;
    std::set<std::string> devices;
    for (const auto& engine : engines_) {
        const Model& model = engine->model();
        info.lora_bytes += engine->lora_bytes();
        if (models.insert(&model).second) info.weights_bytes += static_cast<int64_t>(model.nbytes());
        if (devices.insert(model.placement().device.str()).second) add_device_memory(model.placement().device, info);
    }
    const auto sharing = std::count_if(engines_.begin(), engines_.end(),
                                       [&](const auto& engine) { return &engine->model() == &engines_[0]->model(); });
    info.shared_by = engines_[0]->shared_by() - static_cast<int32_t>(sharing) + 1;
    return info;
}

}  // namespace diffusionz
