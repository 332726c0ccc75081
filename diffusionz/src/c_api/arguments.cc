#include "c_api/arguments.h"

#include <ATen/Parallel.h>

#include <atomic>

namespace diffusionz {
namespace {

std::atomic<int32_t> threads_wanted{0};

}  // namespace

c10::ScalarType dtype_of(int32_t precision, c10::ScalarType automatic) {
    switch (precision) {
        case DIFFUSIONZ_PRECISION_AUTO:
            return automatic;
        case DIFFUSIONZ_PRECISION_FLOAT32:
            return c10::ScalarType::Float;
        case DIFFUSIONZ_PRECISION_BFLOAT16:
            return c10::ScalarType::BFloat16;
    }
    fail(DIFFUSIONZ_E_ARGUMENT, "precision is ", precision, "; it must be DIFFUSIONZ_PRECISION_* (0 to 2)");
}

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
