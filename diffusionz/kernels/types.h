// What every kernel's launch function shares. Nothing here knows torch: pointers are the device's, sizes count elements.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace diffusionz::kernels {

// Types of numbers that kernels read and write.
enum class Type { float32, float16, bfloat16 };

}  // namespace diffusionz::kernels
