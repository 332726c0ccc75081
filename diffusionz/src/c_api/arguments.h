// What the exports of both headers check and share.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <string>

#include "core/error.h"
#include "core/task.h"
#include "core/weights.h"

struct DiffusionZTask {
    diffusionz::Task task;
};

namespace diffusionz {

// Sizes that a struct had before fields were appended; programs built then go on working.
template <class Struct>
inline constexpr std::array<uint32_t, 0> kEarlierSizes{};
template <>
inline constexpr std::array<uint32_t, 1> kEarlierSizes<DiffusionZInitOptions>{20};
template <>
inline constexpr std::array<uint32_t, 1> kEarlierSizes<DiffusionZMemoryInfo>{24};

// Fails with E_ARGUMENT. A size over this library's has fields that it does not know and would ignore; one that never was is no
// size that an _init set.
template <class Struct>
void check_size(const char* name, const Struct* value) {
    if (!value) fail(DIFFUSIONZ_E_ARGUMENT, name, " is NULL");
    constexpr auto& earlier = kEarlierSizes<Struct>;
    if (value->struct_size == sizeof(Struct) || std::find(earlier.begin(), earlier.end(), value->struct_size) != earlier.end()) {
        return;
    }
    std::string known;
    for (const uint32_t size : earlier) known += concat(size, " and ");
    fail(DIFFUSIONZ_E_ARGUMENT, name, "->struct_size is ", value->struct_size, "; this library (ABI ", DIFFUSIONZ_ABI_VERSION,
         ") knows ", known, sizeof(Struct));
}

// The caller's struct as this library has it; fields that the caller does not know are 0, which is their default.
template <class Struct>
Struct read_struct(const char* name, const Struct* value) {
    check_size(name, value);
    Struct whole{};
    std::memcpy(&whole, value, value->struct_size);
    return whole;
}

// Fills in what the caller has room for.
template <class Struct>
void write_struct(Struct whole, Struct* to) {
    whole.struct_size = to->struct_size;
    std::memcpy(to, &whole, whole.struct_size);
}

// The calls inside a context, for its _free to wait for. The engine's queue alone is not enough: a call reads the context before
// its turn, and after it, while it encodes.
class ContextUse {
public:
    [[nodiscard]] std::shared_lock<std::shared_mutex> enter() const { return std::shared_lock(mutex_); }
    void wait() const { const std::unique_lock last(mutex_); }

private:
    mutable std::shared_mutex mutex_;
};

// Fails with E_ARGUMENT for NULL. The call holds what this returns as long as it needs the context.
template <class Context>
[[nodiscard]] std::shared_lock<std::shared_mutex> enter_context(const Context* ctx) {
    if (!ctx) fail(DIFFUSIONZ_E_ARGUMENT, "ctx is NULL");
    return ctx->use.enter();
}

// Which precisions a model can be had in.
enum class Family { zimage, chronos };

// Where a model of `family` shall live, of the arguments of its _init. Fails with E_ARGUMENT for a precision that the family does
// not know, with E_DEVICE where the device is not there or cannot multiply so.
Placement placement_of(int32_t device_id, int32_t precision, Family family);

// Ends a task with its scope, however the call ends.
class TaskEnd {
public:
    explicit TaskEnd(Task& task) : task_(task) {}
    ~TaskEnd() { task_.enter(DIFFUSIONZ_STAGE_DONE); }
    TaskEnd(const TaskEnd&) = delete;
    TaskEnd& operator=(const TaskEnd&) = delete;

private:
    Task& task_;
};

}  // namespace diffusionz
