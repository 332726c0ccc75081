#include "ops/disabled.h"

#include <cstdlib>
#include <string>

namespace diffusionz {

bool kernel_disabled(const char* name) {
    const char* list = std::getenv("DIFFUSIONZ_DISABLE_KERNELS");
    if (!list || !*list) return false;
    return ("," + std::string(list) + ",").find("," + std::string(name) + ",") != std::string::npos;
}

}  // namespace diffusionz
