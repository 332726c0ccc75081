#include "c_api/guard.h"

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

}  // namespace diffusionz
