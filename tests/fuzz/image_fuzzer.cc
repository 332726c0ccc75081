// Decoding and metadata on hostile bytes, and metadata of hostile JSON through both encoders.
//
// Only an Error may come out; what decodes has the size it claims; what was encoded reads back byte for byte.
#include <cstdint>
#include <cstdlib>
#include <string>

#include "core/error.h"
#include "image/image.h"
#include "image/metadata.h"
#include "image/png.h"
#include "image/webp.h"

using namespace diffusionz;

namespace {

// Width times height by the header, without decoding: huge pictures cost seconds each and teach nothing.
bool is_small(Bytes bytes) {
    auto big_endian = [&](size_t at) { return bytes[at] << 24 | bytes[at + 1] << 16 | bytes[at + 2] << 8 | bytes[at + 3]; };
    if (bytes.size() < 30) return true;
    if (bytes[0] == 0x89) return uint32_t(big_endian(16)) <= 2048 && uint32_t(big_endian(20)) <= 2048;
    const size_t width = bytes[15] == 'X'   ? bytes[24] | bytes[25] << 8 | bytes[26] << 16
                         : bytes[15] == 'L' ? (bytes[21] | bytes[22] << 8) & 0x3fff
                                            : (bytes[26] | bytes[27] << 8) & 0x3fff;
    return width <= 2048;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const Bytes bytes(data, size);
    if (is_small(bytes)) {
        try {
            const Rgb image = decode_image(bytes);
            if (image.pixels.size() != size_t(image.width) * image.height * 3) std::abort();
        } catch (const Error&) {
        }
    }
    try {
        if (!is_json_object(read_metadata(bytes))) std::abort();
    } catch (const Error&) {
    }

    static const uint8_t kPixels[3 * 4 * 3] = {};
    const std::string text(data, data + size);
    try {
        if (read_metadata(encode_png(kPixels, 4, 3, text)) != (text.empty() ? "{}" : text)) std::abort();
        if (read_metadata(encode_webp(kPixels, 4, 3, true, 0, text)) != (text.empty() ? "{}" : text)) std::abort();
    } catch (const Error&) {
    }
    exif_comment(bytes);
    xmp_json({reinterpret_cast<const char*>(data), size});
    return 0;
}
