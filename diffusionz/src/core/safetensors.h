// Reader of the safetensors format (huggingface/safetensors): eight bytes of header length, a JSON header, then raw tensors.
// The file is hostile input: every size in it is checked before it is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace diffusionz {

enum class Dtype { float64, float32, float16, bfloat16, other };

// A tensor in somebody else's memory, contiguous, rows first.
struct TensorView {
    Dtype dtype = Dtype::other;
    std::string dtype_name;  // as the file has it, for messages
    std::vector<int64_t> shape;
    const uint8_t* data = nullptr;
    size_t size_bytes = 0;

    // Rows [begin, begin + count) of the first dimension.
    TensorView rows(int64_t begin, int64_t count) const;
};

struct SafetensorsFile {
    std::map<std::string, TensorView> tensors;    // they point into the file
    std::map<std::string, std::string> metadata;  // the header's __metadata__
};

// Fails with `status` and names `name` when the bytes are not a valid file.
SafetensorsFile read_safetensors(std::string_view file, const std::string& name, int32_t status);

std::string shape_text(const std::vector<int64_t>& shape);  // "[3, 4]"

}  // namespace diffusionz
