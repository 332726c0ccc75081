// WebP, through libwebp.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "image/image.h"

namespace diffusionz {

// `rgb` is [height, width, 3], each side at most 16383. `quality` is 0..100, of lossy pictures. `metadata_json` is a JSON object,
// or "" for none. The same arguments give the same bytes. Fails with E_IMAGE for the size, E_ARGUMENT for quality and metadata.
std::vector<uint8_t> encode_webp(const uint8_t* rgb, int32_t width, int32_t height, bool lossless, int32_t quality,
                                 const std::string& metadata_json);

// Still pictures: an animation is E_IMAGE, like whatever cannot be read.
Rgb decode_webp(Bytes bytes);

// See read_metadata.
std::string read_webp_metadata(Bytes bytes);

}  // namespace diffusionz
