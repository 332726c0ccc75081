// What the tokenizer needs of Unicode.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace diffusionz {

// Offset of the first byte that is not well-formed UTF-8; text.size() when all is.
size_t utf8_error_offset(std::string_view text);

// Normalization form C of well-formed UTF-8.
std::string nfc(std::string_view text);

}  // namespace diffusionz
