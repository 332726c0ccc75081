// A lock that serves its callers in the order of their arrival, and that a cancelled caller can leave.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>

#include "core/task.h"

namespace diffusionz {

class CallQueue {
public:
    // Holds the queue's front for its lifetime.
    class Turn {
    public:
        // Waits for the calls before this one. Fails with E_CANCELLED when `task` (may be null) is cancelled meanwhile.
        explicit Turn(CallQueue& queue, const Task* task = nullptr) : queue_(queue) {
            std::unique_lock lock(queue_.mutex_);
            const uint64_t ticket = queue_.next_ticket_++;
            queue_.waiting_.push_back(ticket);
            while (queue_.waiting_.front() != ticket) {
                // Woken by the caller before; the time limit is for a cancel, which does not know the queue.
                queue_.turned_.wait_for(lock, std::chrono::milliseconds(20));
                if (task && task->cancelled()) {
                    std::erase(queue_.waiting_, ticket);
                    queue_.turned_.notify_all();
                    lock.unlock();
                    task->check();
                }
            }
        }
        ~Turn() {
            const std::lock_guard lock(queue_.mutex_);
            queue_.waiting_.pop_front();
            queue_.turned_.notify_all();
        }
        Turn(const Turn&) = delete;
        Turn& operator=(const Turn&) = delete;

    private:
        CallQueue& queue_;
    };

private:
    std::mutex mutex_;
    std::condition_variable turned_;
    std::deque<uint64_t> waiting_;
    uint64_t next_ticket_ = 0;
};

}  // namespace diffusionz
