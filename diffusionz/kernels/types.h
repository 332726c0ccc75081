// What every kernel's launch function shares. Nothing here knows torch: pointers are the device's, sizes count elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace diffusionz::kernels {

// Types of numbers that kernels read and write.
enum class Type { float32, float16, bfloat16 };

// Rows of numbers that lie side by side: row (outer, inner) begins at data + outer * outer_stride + inner * inner_stride.
struct Rows {
    const void* data;
    int64_t outer_stride, inner_stride;
};

// A row of factors for each outer index: of index i at data + i * stride. Null data stands for ones.
struct Factors {
    const void* data = nullptr;
    int64_t stride = 0;
};

// Where a result goes, contiguous; null where that form is not asked for.
struct Written {
    void* plain = nullptr;
    uint8_t* fp8 = nullptr;  // float8_e4m3fn
    float* row_scales = nullptr;
};

}  // namespace diffusionz::kernels
