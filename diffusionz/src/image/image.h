// Pictures as bytes, of whatever format: the pieces that WebP and PNG share, and reading by magic.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace diffusionz {

using Bytes = std::span<const uint8_t>;

struct Rgb {
    int32_t width = 0;
    int32_t height = 0;
    std::vector<uint8_t> pixels;  // [height, width, 3]
};

// No picture with a longer side is read or written. It bounds the memory that a few hostile bytes can ask for.
inline constexpr int32_t kImageSideMax = 16384;
// Nor metadata of more bytes.
inline constexpr size_t kMetadataBytesMax = 4 << 20;

// Fails with E_IMAGE unless both sides are 1..`side_max`. `format` begins the message.
void check_image_size(const char* format, int64_t width, int64_t height, int32_t side_max);

// RGBA [height, width, 4] over black: in place, and then cut to RGB.
void composite_over_black(std::vector<uint8_t>& pixels);

// Decodes PNG or WebP. Alpha is dropped over black. Fails with E_IMAGE.
Rgb decode_image(Bytes bytes);

// The generation parameters in a PNG or WebP: the JSON object that the encoder was given, byte for byte;
// {"parameters": "..."} for a picture that holds only an A1111 text; "{}" when it has neither. Fails with E_IMAGE.
std::string read_metadata(Bytes bytes);

}  // namespace diffusionz
