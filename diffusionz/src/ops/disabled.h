// DIFFUSIONZ_DISABLE_KERNELS=name,... sends the named operations to their ATen reference: a suspicion becomes a one-line test. It
// is read at every call, so that one process can try several; what a graph has recorded stays in it, and what a model has
// prepared when it was opened (weights reordered for oneDNN, or folded) stays so.
#pragma once

namespace diffusionz {

bool kernel_disabled(const char* name);

}  // namespace diffusionz
