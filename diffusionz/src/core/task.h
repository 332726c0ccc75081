// Progress, cancelling and previews of one call, shared between the thread that runs it and those that watch.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "core/error.h"

namespace diffusionz {

// A picture in the making.
struct Preview {
    struct Free {
        void operator()(uint8_t* memory) const { std::free(memory); }
    };

    int32_t image = 0;                       // which of the call's pictures, from 0
    int32_t preview = 0, preview_count = 0;  // which of that picture's previews, from 0, and all
    int32_t step = 0, step_count = 0;        // of that picture
    int32_t width = 0, height = 0;           // pixels
    std::unique_ptr<uint8_t[], Free> rgb;    // [height, width, 3], from malloc: it leaves through the C ABI as it is
};

class Task {
public:
    // How many previews the call makes of each picture. Fails with E_ARGUMENT once a call has the task.
    void keep_previews(int32_t count) {
        if (used_) fail(DIFFUSIONZ_E_ARGUMENT, "the task has served a call already; previews are asked for before it");
        previews_ = count;
    }
    int32_t previews() const { return previews_; }

    // Marks the task as taken by a call of that many pictures. Fails with E_ARGUMENT the second time.
    void begin(int32_t image_count) {
        if (used_.exchange(true)) fail(DIFFUSIONZ_E_ARGUMENT, "the task has served a call already; each call needs a new one");
        image_count_ = image_count;
        owner_ = std::this_thread::get_id();
        entered_ = Clock::now();
        stage_ = DIFFUSIONZ_STAGE_QUEUED;
    }

    // The running call only: moves to `stage` and books the time since the last move to the stage left. Of a call's threads the
    // one that began it is heard: pictures that are drawn side by side have no one stage.
    void enter(int32_t stage) {
        if (std::this_thread::get_id() != owner_) return;
        const auto now = Clock::now();
        auto& spent = stage_ms_[static_cast<size_t>(stage_.load())];
        spent = spent + std::chrono::duration<float, std::milli>(now - entered_).count();
        entered_ = now;
        stage_ = stage;
    }
    void set_step_count(int32_t count) { step_count_ = count; }
    void add_steps(int32_t count) { step_ += count; }
    void add_image() { ++image_; }
    // Replaces the one that nobody took.
    void show(Preview preview) {
        std::optional<Preview> old(std::move(preview));  // freed when the lock is gone
        const std::lock_guard lock(preview_mutex_);
        old.swap(preview_);
    }
    std::optional<Preview> take_preview() {
        const std::lock_guard lock(preview_mutex_);
        return std::exchange(preview_, std::nullopt);
    }

    void cancel() { cancelled_ = true; }
    bool cancelled() const { return cancelled_; }
    // Fails with E_CANCELLED when cancel was called.
    void check() const {
        if (cancelled_) fail(DIFFUSIONZ_E_CANCELLED, "cancelled after ", step_.load(), " of ", step_count_.load(), " steps");
    }

    void read(DiffusionZProgress& progress) const {
        progress.stage = stage_;
        progress.step = step_;
        progress.step_count = step_count_;
        progress.image = image_;
        progress.image_count = image_count_;
        progress.queue_ms = stage_ms_[DIFFUSIONZ_STAGE_QUEUED];
        progress.text_ms = stage_ms_[DIFFUSIONZ_STAGE_TEXT];
        progress.denoise_ms = stage_ms_[DIFFUSIONZ_STAGE_DENOISE];
        progress.decode_ms = stage_ms_[DIFFUSIONZ_STAGE_DECODE];
        progress.forecast_ms = stage_ms_[DIFFUSIONZ_STAGE_FORECAST];
    }

private:
    using Clock = std::chrono::steady_clock;

    std::atomic<bool> used_{false}, cancelled_{false};
    std::atomic<int32_t> stage_{DIFFUSIONZ_STAGE_IDLE}, step_{0}, step_count_{0}, image_{0}, image_count_{0}, previews_{0};
    std::array<std::atomic<float>, DIFFUSIONZ_STAGE_FORECAST + 1> stage_ms_{};
    std::thread::id owner_;
    Clock::time_point entered_;
    std::mutex preview_mutex_;
    std::optional<Preview> preview_;  // the newest that nobody took
};

}  // namespace diffusionz
