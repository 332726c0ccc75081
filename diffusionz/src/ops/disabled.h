// DIFFUSIONZ_DISABLE_KERNELS=name,... sends the named operations to their ATen reference: a suspicion becomes a one-line test.
#pragma once

namespace diffusionz {

bool kernel_disabled(const char* name);

}  // namespace diffusionz
