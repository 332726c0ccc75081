// DIFFUSIONZ_TRACE=FOLDER writes what passes between the blocks of a model's first evaluation, for whoever compares two
// precisions block by block: FOLDER/000_NAME.npy and so on, float32.
#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <string>

namespace diffusionz {

// Sees a tensor by its name.
using Watch = std::function<void(const std::string& name, const at::Tensor& value)>;

// Writes each tensor that it sees into the folder of DIFFUSIONZ_TRACE; empty where that is not set. Its use fails with E_ARGUMENT
// when a file cannot be written.
Watch trace_from_environment();

}  // namespace diffusionz
