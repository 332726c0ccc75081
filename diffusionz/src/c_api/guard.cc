#include "c_api/guard.h"

#include "core/device.h"

namespace diffusionz {

std::string& last_error() noexcept {
    thread_local std::string message;
    return message;
}

int32_t remember(int32_t status, const char* message) noexcept {
    try {
        last_error() = message;
    } catch (...) {
        last_error().clear();
    }
    return status;
}

int32_t remember_out_of_memory(const std::string& message) noexcept {
    try {
        return remember(DIFFUSIONZ_E_OUT_OF_MEMORY, after_out_of_memory(message).c_str());
    } catch (...) {
        return remember(DIFFUSIONZ_E_OUT_OF_MEMORY, message.c_str());
    }
}

}  // namespace diffusionz
