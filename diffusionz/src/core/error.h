// The one exception type of the library. src/c_api turns it into a status and a last error; nothing else catches it.
#pragma once

#include <cstdint>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>

#include "diffusionz_c_api.h"

namespace diffusionz {

class Error : public std::runtime_error {
public:
    Error(int32_t status, const std::string& message) : std::runtime_error(message), status_(status) {}
    int32_t status() const noexcept { return status_; }

private:
    int32_t status_;  // DIFFUSIONZ_E_*
};

// Streams its arguments into one string.
template <class... Parts>
std::string concat(const Parts&... parts) {
    std::ostringstream out;
    out.imbue(std::locale::classic());  // the host's locale could put separators into numbers
    (out << ... << parts);
    return out.str();
}

// Throws an Error whose message is its arguments in a row. Messages name the value and what is allowed.
template <class... Parts>
[[noreturn]] void fail(int32_t status, const Parts&... parts) {
    throw Error(status, concat(parts...));
}

}  // namespace diffusionz
