// Descriptions of tensors for Hopper's tensor memory accelerator, made on the host.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace diffusionz::kernels {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// cuTensorMapEncodeTiled, without linking the driver's library: CPU-only machines load this library, too. Null where the driver
// has none.
inline EncodeTensorMap tensor_map_encoder() {
    static const EncodeTensorMap encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) !=
                cudaSuccess ||
            found != cudaDriverEntryPointSuccess)
            function = nullptr;
        return reinterpret_cast<EncodeTensorMap>(function);
    }();
    return encode;
}

// A tensor of 16-bit numbers of up to 4 dimensions, the one without gaps first, `strides` of the others in numbers; read and written in
// boxes whose rows of 128 bytes lie in the 128-byte swizzle. What lies outside reads as zero. False when it cannot be described.
inline bool describe(CUtensorMap* map, const void* data, std::initializer_list<int64_t> sizes,
                     std::initializer_list<int64_t> strides, std::initializer_list<int> box) {
    cuuint64_t size[4], stride[4];
    cuuint32_t tile[4], step[4] = {1, 1, 1, 1};
    std::copy(sizes.begin(), sizes.end(), size);
    std::transform(strides.begin(), strides.end(), stride, [](int64_t numbers) { return static_cast<cuuint64_t>(numbers) * 2; });
    std::copy(box.begin(), box.end(), tile);
    const EncodeTensorMap encode = tensor_map_encoder();
    return encode && encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, static_cast<cuuint32_t>(sizes.size()), const_cast<void*>(data),
                            size, stride, tile, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace diffusionz::kernels
