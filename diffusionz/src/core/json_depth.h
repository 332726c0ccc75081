// How deep JSON text is nested, told before it becomes a document.
#pragma once

#include <cstddef>
#include <string_view>

namespace diffusionz {

// No file of a model's comes near. Documents are parsed without recursion, but copied and written with it: some 100,000 levels, a
// byte each, use up a thread's stack.
inline constexpr size_t kJsonDepthMax = 256;

// Whether arrays and objects in `text` are nested deeper than kJsonDepthMax.
inline bool json_too_deep(std::string_view text) {
    size_t depth = 0;
    bool quoted = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (quoted && c == '\\') {
            ++i;
        } else if (c == '"') {
            quoted = !quoted;
        } else if (!quoted && (c == '[' || c == '{')) {
            if (++depth > kJsonDepthMax) return true;
        } else if (!quoted && (c == ']' || c == '}') && depth > 0) {
            --depth;
        }
    }
    return false;
}

}  // namespace diffusionz
