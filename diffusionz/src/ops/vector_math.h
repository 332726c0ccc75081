// What the CPU loops of this folder share: wide vectors where the processor has them, and an exponential that vectorises.
#pragma once

#include <bit>
#include <cstdint>

// Compiles a function once for each kind of processor; the loader picks. The plain build would use 128-bit vectors everywhere.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define DIFFUSIONZ_VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), optimize("O3")))
#else
#define DIFFUSIONZ_VECTORIZED
#endif

namespace diffusionz {

// e^x to 2 units in the last place for x in [-87, 88], clamped outside: 2^n times a polynomial of the rest (Cephes' expf).
[[gnu::always_inline]] inline float exp_approx(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    // Adding and taking off 1.5 * 2^23 rounds to the nearest integer.
    const float magic = 12582912.0f;
    const float n = (x * 1.44269504088896341f + magic) - magic;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

}  // namespace diffusionz
