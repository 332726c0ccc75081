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

// Remembers what another library threw. When the device has no memory left, gives back what was kept of it.
int32_t remember_failure(const std::exception& error) noexcept;

// Runs `body` and gives its status.
template <class Body>
int32_t guard(Body&& body) noexcept {
    last_error().clear();
    try {
        body();
        return DIFFUSIONZ_OK;
    } catch (const Error& e) {
        return remember(e.status(), e.what());
    } catch (const std::exception& e) {
        return remember_failure(e);
    } catch (...) {
        return remember(DIFFUSIONZ_E_INTERNAL, "an exception of unknown type");
    }
}

}  // namespace diffusionz
