// What the exports of both headers check and share.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "core/error.h"
#include "core/task.h"

struct DiffusionZTask {
    diffusionz::Task task;
};

namespace diffusionz {

template <class Struct>
void check_size(const char* name, const Struct* value) {
    if (!value) fail(DIFFUSIONZ_E_ARGUMENT, name, " is NULL");
    // A larger one has fields that this library does not know and would ignore; a smaller one was not made by its _init.
    if (value->struct_size != sizeof(Struct)) {
        fail(DIFFUSIONZ_E_ARGUMENT, name, "->struct_size is ", value->struct_size, "; this library (ABI ", DIFFUSIONZ_ABI_VERSION,
             ") knows ", sizeof(Struct));
    }
}

// The dtype of a DIFFUSIONZ_PRECISION_*, `automatic` for AUTO. Fails with E_ARGUMENT.
c10::ScalarType dtype_of(int32_t precision, c10::ScalarType automatic);

// Remembers the CPU threads that a caller asked for, 0 for nobody's wish, and applies them. Fails with E_ARGUMENT.
void want_threads(int32_t count);

// OpenMP keeps the number of threads by the thread that calls, so each call brings the last wish along.
void apply_threads();

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
