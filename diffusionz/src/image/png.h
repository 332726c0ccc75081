// PNG, through libpng.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "image/image.h"

namespace diffusionz {

// `rgb` is [height, width, 3]; `metadata_json` a JSON object, or "" for none. Fails with E_IMAGE for the size, E_ARGUMENT for the
// metadata.
std::vector<uint8_t> encode_png(const uint8_t* rgb, int32_t width, int32_t height, const std::string& metadata_json);

// Any PNG: gray, palette, 16 bits, alpha, interlaced. Of an animation its still picture. Fails with E_IMAGE.
Rgb decode_png(Bytes bytes);

// See read_metadata.
std::string read_png_metadata(Bytes bytes);

}  // namespace diffusionz
