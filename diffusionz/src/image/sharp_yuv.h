// RGB to the luma and halved chroma of lossy WebP, chroma chosen so that edges between colours stay sharp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace diffusionz {

// Luma has a sample a pixel, chroma one for each 2 x 2 of them; rows are `stride` bytes apart.
struct YuvPlanes {
    uint8_t* y;
    uint8_t* u;
    uint8_t* v;
    ptrdiff_t y_stride, uv_stride;
};

// Fills `to` from `rgb`, [height, width, 3], on several threads. Each side must be at least 2. The same pixels give the same
// samples whatever the processor and its threads.
void sharp_yuv(const uint8_t* rgb, int32_t width, int32_t height, const YuvPlanes& to);

}  // namespace diffusionz
