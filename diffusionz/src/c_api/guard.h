// The boundary: exceptions become a status and a thread-local last error. Nothing outside this folder catches.
#pragma once

#include <c10/util/Exception.h>

#include <new>
#include <string>

#include "core/device.h"
#include "core/error.h"

namespace diffusionz {

std::string& last_error() noexcept;

// Remembers `message`; with memory gone it is cut rather than thrown over.
int32_t remember(int32_t status, const char* message) noexcept;

// Remembers that the device has no memory left, and gives back what was kept of it.
int32_t remember_out_of_memory(const std::string& message) noexcept;

// Runs `body` and gives its status.
template <class Body>
int32_t guard(Body&& body) noexcept {
    last_error().clear();
    try {
        body();
        return DIFFUSIONZ_OK;
    } catch (const Error& e) {
        return remember(e.status(), e.what());
    } catch (const c10::Error& e) {
        const std::string what = e.what_without_backtrace();
        const OutOfMemory whose = out_of_memory(e);
        if (whose == OutOfMemory::host) return remember(DIFFUSIONZ_E_OUT_OF_MEMORY, what.c_str());
        if (whose == OutOfMemory::device) return remember_out_of_memory(what);
        if (what.find("CUDA error") != std::string::npos) return remember(DIFFUSIONZ_E_DEVICE, what.c_str());
        return remember(DIFFUSIONZ_E_INTERNAL, what.c_str());
    } catch (const std::bad_alloc&) {
        return remember(DIFFUSIONZ_E_OUT_OF_MEMORY, "the host is out of memory");
    } catch (const std::exception& e) {
        return remember(DIFFUSIONZ_E_INTERNAL, e.what());
    } catch (...) {
        return remember(DIFFUSIONZ_E_INTERNAL, "an exception of unknown type");
    }
}

}  // namespace diffusionz
