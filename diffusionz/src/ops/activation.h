// What a linear layer reads: numbers, or the same as FP8 with a scale a row, or both (an adapter's product reads the numbers).
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

struct Activation {
    Activation() = default;
    Activation(at::Tensor numbers) : plain(std::move(numbers)) {}  // NOLINT: a tensor is an activation

    at::Tensor plain;       // [..., width], undefined where only the FP8 form was asked for
    at::Tensor fp8;         // float8_e4m3fn [..., width], undefined where it was not asked for
    at::Tensor row_scales;  // float32 [..., 1]: a number is about fp8 * row_scales
};

// Which forms an operation writes.
enum class Form { plain, fp8, both };

}  // namespace diffusionz
