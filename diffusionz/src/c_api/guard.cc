#include "c_api/guard.h"

#include <filesystem>

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

int32_t remember_failure(const std::exception& error) noexcept {
    try {
        const auto* torch = dynamic_cast<const c10::Error*>(&error);
        const std::string what = torch ? torch->what_without_backtrace() : error.what();
        switch (out_of_memory(error)) {
            case OutOfMemory::host:
                return remember(DIFFUSIONZ_E_OUT_OF_MEMORY, ("the host is out of memory: " + what).c_str());
            case OutOfMemory::device:
                return remember(DIFFUSIONZ_E_OUT_OF_MEMORY, after_out_of_memory(what).c_str());
            case OutOfMemory::no:
                break;
        }
        // Only a model's or an adapter's files are looked for: no right to look, or a link to itself.
        if (dynamic_cast<const std::filesystem::filesystem_error*>(&error)) return remember(DIFFUSIONZ_E_MODEL, what.c_str());
        const bool device = torch && what.find("CUDA error") != std::string::npos;
        return remember(device ? DIFFUSIONZ_E_DEVICE : DIFFUSIONZ_E_INTERNAL, what.c_str());
    } catch (...) {  // the host's memory for the message, or the device's that could not be given back
        return remember(DIFFUSIONZ_E_OUT_OF_MEMORY, "out of memory");
    }
}

}  // namespace diffusionz
