#include "core/threads.h"

#include <ATen/Parallel.h>

#include <atomic>

#include "core/error.h"

namespace diffusionz {
namespace {

std::atomic<int32_t> threads_wanted{0};

}  // namespace

void want_threads(int32_t count) {
    if (count < 0 || count > 4096) fail(DIFFUSIONZ_E_ARGUMENT, "num_threads is ", count, "; it must be from 0 to 4096");
    if (count > 0) threads_wanted = count;
    apply_threads();
}

void apply_threads() {
    const int32_t wanted = threads_wanted;
    if (wanted > 0 && at::get_num_threads() != wanted) at::set_num_threads(wanted);
}

}  // namespace diffusionz
