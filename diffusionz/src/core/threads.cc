#include "core/threads.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <mutex>

#include "core/error.h"

namespace diffusionz {
namespace {

std::atomic<int32_t> threads_wanted{0};

// MKL picks the kernel of a vector function at its first call. Where several threads share that call, one of them can get a
// kernel of low accuracy (cosines 1.5e-4 off; pytorch issue 188792), so each function that the engines use is first called by one
// thread.
void settle_vector_functions() {
    static std::once_flag once;
    std::call_once(once, [] {
        const at::Tensor x = at::zeros({1});
        for (const auto function : {at::cos, at::sin, at::exp, at::tanh, at::sinh, at::asinh}) function(x);
    });
}

}  // namespace

void want_threads(int32_t count) {
    if (count < 0 || count > 4096) fail(DIFFUSIONZ_E_ARGUMENT, "num_threads is ", count, "; it must be from 0 to 4096");
    if (count > 0) threads_wanted = count;
    apply_threads();
}

void apply_threads() {
    settle_vector_functions();
    const int32_t wanted = threads_wanted;
    if (wanted > 0 && at::get_num_threads() != wanted) at::set_num_threads(wanted);
}

}  // namespace diffusionz
