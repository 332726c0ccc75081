#include "core/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <vector>

#include "core/error.h"

namespace diffusionz {
namespace {

// Offset of the first byte that is not well-formed; text.size() when all is.
size_t error_offset(std::string_view text) {
    const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    size_t offset = 0;
    while (offset < text.size()) {
        if (bytes[offset] < 0x80) {
            ++offset;
            continue;
        }
        // Four bytes are enough for any character, and keep the length inside utf8proc's signed size.
        utf8proc_int32_t code_point;
        auto length = utf8proc_iterate(bytes + offset, std::min<size_t>(4, text.size() - offset), &code_point);
        if (length <= 0) return offset;
        offset += length;
    }
    return offset;
}

}  // namespace

void check_utf8(std::string_view text) {
    const size_t bad = error_offset(text);
    if (bad != text.size())
        fail(DIFFUSIONZ_E_ARGUMENT, "the text is not UTF-8: byte ", bad, " of ", text.size(), " begins no character");
}

std::string nfc(std::string_view text) {
    // Every character before U+0300, whose first byte is 0xCC, is its own normal form and combines with nothing before it.
    if (std::all_of(text.begin(), text.end(), [](unsigned char byte) { return byte < 0xCC; })) return std::string(text);

    const auto options = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    std::vector<utf8proc_int32_t> points;
    points.reserve(text.size());
    const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
    for (size_t offset = 0; offset < text.size();) {
        utf8proc_int32_t point;
        offset += utf8proc_iterate(bytes + offset, std::min<size_t>(4, text.size() - offset), &point);
        utf8proc_int32_t parts[8];  // a canonical decomposition has at most 4
        int boundary_class = 0;
        auto count = utf8proc_decompose_char(point, parts, std::size(parts), options, &boundary_class);
        points.insert(points.end(), parts, parts + count);
    }

    // Canonical order: each run of marks by combining class. utf8proc_map sorts by swapping neighbours, which a hostile
    // text of many marks makes quadratic.
    auto combining_class = [](utf8proc_int32_t point) { return utf8proc_get_property(point)->combining_class; };
    for (size_t begin = 0; begin < points.size();) {
        size_t end = begin;
        while (end < points.size() && combining_class(points[end]) != 0) ++end;
        std::stable_sort(points.begin() + begin, points.begin() + end,
                         [&](auto a, auto b) { return combining_class(a) < combining_class(b); });
        begin = end + 1;
    }

    points.resize(utf8proc_normalize_utf32(points.data(), points.size(), options));
    std::string result;
    result.reserve(text.size());
    for (auto point : points) {
        utf8proc_uint8_t encoded[4];
        auto length = utf8proc_encode_char(point, encoded);
        result.append(reinterpret_cast<const char*>(encoded), length);
    }
    return result;
}

}  // namespace diffusionz
