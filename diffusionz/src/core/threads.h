// CPU threads of the whole process.
#pragma once

#include <cstdint>

namespace diffusionz {

// Remembers the CPU threads that a caller asked for, 0 for nobody's wish, and applies them. Fails with E_ARGUMENT.
void want_threads(int32_t count);

// Makes the calling thread ready to compute. OpenMP keeps the number of threads by the thread that calls, so each call brings the
// last wish along; the first call settles the vector functions.
void apply_threads();

}  // namespace diffusionz
