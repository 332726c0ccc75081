#include "image/image.h"

#include <algorithm>
#include <cstdio>

#include "core/error.h"
#include "image/png.h"
#include "image/webp.h"

namespace diffusionz {
namespace {

enum class Format { kPng, kWebp };

Format format_of(Bytes bytes) {
    auto at = [&](size_t offset, std::string_view text) {
        return bytes.size() >= offset + text.size() && std::equal(text.begin(), text.end(), bytes.begin() + offset,
                                                                  [](char a, uint8_t b) { return static_cast<uint8_t>(a) == b; });
    };
    if (at(0, "\x89PNG\r\n\x1a\n")) return Format::kPng;
    if (at(0, "RIFF") && at(8, "WEBP")) return Format::kWebp;
    std::string first;
    for (uint8_t byte : bytes.first(std::min<size_t>(bytes.size(), 12))) {
        char digits[4];
        std::snprintf(digits, sizeof(digits), " %02x", byte);
        first += digits;
    }
    if (first.empty()) first = " nothing";
    fail(DIFFUSIONZ_E_IMAGE, "not a PNG or WebP, the formats that are read: ", bytes.size(), " bytes that begin with", first);
}

}  // namespace

void check_image_size(const char* format, int64_t width, int64_t height, int32_t side_max) {
    if (width < 1 || height < 1 || width > side_max || height > side_max)
        fail(DIFFUSIONZ_E_IMAGE, format, ": the picture is ", width, " x ", height, "; each side must be 1..", side_max);
}

void composite_over_black(std::vector<uint8_t>& pixels) {
    const size_t count = pixels.size() / 4;
    for (size_t i = 0; i < count; ++i) {
        const unsigned alpha = pixels[4 * i + 3];
        for (size_t channel = 0; channel < 3; ++channel)
            pixels[3 * i + channel] = static_cast<uint8_t>((pixels[4 * i + channel] * alpha + 127) / 255);
    }
    pixels.resize(3 * count);
}

Rgb decode_image(Bytes bytes) { return format_of(bytes) == Format::kPng ? decode_png(bytes) : decode_webp(bytes); }

std::string read_metadata(Bytes bytes) {
    return format_of(bytes) == Format::kPng ? read_png_metadata(bytes) : read_webp_metadata(bytes);
}

}  // namespace diffusionz
