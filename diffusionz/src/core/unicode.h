// What the tokenizer needs of Unicode.
#pragma once

#include <string>
#include <string_view>

namespace diffusionz {

// Fails with E_ARGUMENT, naming the byte, when `text` is not well-formed UTF-8.
void check_utf8(std::string_view text);

// Normalization form C of well-formed UTF-8.
std::string nfc(std::string_view text);

}  // namespace diffusionz
