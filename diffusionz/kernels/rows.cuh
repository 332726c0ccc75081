// What the kernels that are bound by memory share: their launches, and for a block a row, the row in registers, how many threads
// and vectors a row takes.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernels/launch.cuh"

namespace diffusionz::kernels {

// What these kernels begin with: the next kernel's blocks may already take their places, and nothing is touched before the last
// one's results are there.
__device__ inline void between_kernels() {
    start_the_kernel_after();
    wait_for_the_kernel_before();
}

// The most threads that a kernel of so many vectors a thread is launched with.
template <int kVectors>
constexpr int kRowThreadsMax = kVectors <= 2 ? 1024 : 512;

// Calls launch(numbers a vector, vectors a thread, threads): the first two as integral constants. cudaErrorNotSupported for rows
// that are too wide for the registers of a block.
template <class T, class Launch>
cudaError_t launch_rows(bool aligned, int64_t rows, int64_t width, Launch&& launch) {
    constexpr int64_t kFewRows = 512;  // a processor has less than four of them: more threads a row are faster
    const auto with = [&](auto numbers, auto vectors) {
        constexpr int64_t kNumbers = decltype(numbers)::value, kVectors = decltype(vectors)::value;
        const int64_t warps = (width / kNumbers + kVectors * 32 - 1) / (kVectors * 32);
        return warps * 32 <= kRowThreadsMax<kVectors> ? launch(numbers, vectors, static_cast<int>(warps * 32))
                                                      : cudaErrorNotSupported;
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    using Numbers = std::integral_constant<int, 16 / static_cast<int>(sizeof(T))>;
    if (rows == 0 || width == 0) return cudaSuccess;
    if (!aligned) return with(One(), std::integral_constant<int, 16>());
    return rows <= kFewRows && width <= Numbers::value * kRowThreadsMax<1> ? with(Numbers(), One()) : with(Numbers(), Two());
}

// Whether vectors of 16 bytes tile rows of `width` numbers that begin at multiples of `strides` from `pointers`; null is no
// pointer.
template <class T>
bool tiles(int64_t width, std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
    constexpr int64_t kNumbers = 16 / static_cast<int64_t>(sizeof(T));
    bool fits = width % kNumbers == 0;
    for (const void* pointer : pointers) fits = fits && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    for (const int64_t stride : strides) fits = fits && stride % kNumbers == 0;
    return fits;
}

}  // namespace diffusionz::kernels
