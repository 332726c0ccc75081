// The safetensors reader on hostile bytes. Only an Error may come out, and every tensor lies inside the input.
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string_view>

#include "core/error.h"
#include "core/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    try {
        const auto file = diffusionz::read_safetensors({reinterpret_cast<const char*>(data), size}, "fuzzed", DIFFUSIONZ_E_MODEL);
        for (const auto& [name, view] : file.tensors) {
            const std::less_equal<const uint8_t*> not_after;
            if (!not_after(data, view.data) || !not_after(view.data + view.size_bytes, data + size)) std::abort();
        }
    } catch (const diffusionz::Error&) {
    }
    return 0;
}
