// Loads and stores of 16 bytes, whatever the type of the numbers; conversions; sums and maxima over warps and blocks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "kernels/types.h"

namespace diffusionz::kernels {

// Numbers that a thread loads or stores at once, aligned to their size: 16 bytes unless said otherwise.
template <class T, int kNumbers = 16 / static_cast<int>(sizeof(T))>
struct alignas(kNumbers * sizeof(T)) Vector {
    static constexpr int kCount = kNumbers;
    T values[kCount];
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Vector number `index` of an array, by a load that the caches need not keep: what is read once.
template <class T, int kNumbers>
__device__ inline Vector<T, kNumbers> load_once(const T* data, int64_t index) {
    using Numbers = Vector<T, kNumbers>;
    const Numbers* from = reinterpret_cast<const Numbers*>(data) + index;
    if constexpr (sizeof(Numbers) == 16) {
        const int4 raw = __ldcs(reinterpret_cast<const int4*>(from));
        return reinterpret_cast<const Numbers&>(raw);
    } else {
        return *from;
    }
}

template <class T, int kNumbers>
__device__ inline Vector<T, kNumbers> load(const T* data, int64_t index) {
    return reinterpret_cast<const Vector<T, kNumbers>*>(data)[index];
}

// Rounds once and stores. Two numbers of 16 bits are one instruction's conversion.
template <class T, int kNumbers>
__device__ inline void store(T* data, int64_t index, const float (&numbers)[kNumbers]) {
    Vector<T, kNumbers> rounded;
    if constexpr (kNumbers % 2 == 0 && std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll
        for (int i = 0; i < kNumbers; i += 2)
            reinterpret_cast<__nv_bfloat162&>(rounded.values[i]) = __floats2bfloat162_rn(numbers[i], numbers[i + 1]);
    } else if constexpr (kNumbers % 2 == 0 && std::is_same_v<T, __half>) {
#pragma unroll
        for (int i = 0; i < kNumbers; i += 2)
            reinterpret_cast<__half2&>(rounded.values[i]) = __floats2half2_rn(numbers[i], numbers[i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) rounded.values[i] = from_float<T>(numbers[i]);
    }
    reinterpret_cast<Vector<T, kNumbers>*>(data)[index] = rounded;
}

// The same as float8_e4m3fn, by the hardware's conversion from compute capability 8.9 on; beyond 448 saturates.
template <int kNumbers>
__device__ inline void store_fp8(uint8_t* data, int64_t index, const float (&numbers)[kNumbers], float factor) {
    Vector<uint8_t, kNumbers> rounded;
    if constexpr (kNumbers % 2 == 0) {
#pragma unroll
        for (int i = 0; i < kNumbers; i += 2) {
            const __nv_fp8x2_storage_t pair =
                __nv_cvt_float2_to_fp8x2({numbers[i] * factor, numbers[i + 1] * factor}, __NV_SATFINITE, __NV_E4M3);
            rounded.values[i] = static_cast<uint8_t>(pair & 0xFF);
            rounded.values[i + 1] = static_cast<uint8_t>(pair >> 8);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kNumbers; ++i)
            rounded.values[i] = __nv_cvt_float_to_fp8(numbers[i] * factor, __NV_SATFINITE, __NV_E4M3);
    }
    reinterpret_cast<Vector<uint8_t, kNumbers>*>(data)[index] = rounded;
}

// The scale of a row of FP8 numbers, from the largest absolute number of the row.
__device__ inline float fp8_scale(float largest) {
    constexpr float kLargest = 448.0f, kSmallestMax = 1e-30f;  // below it the reciprocal of a scale would overflow
    return largest == 0.0f ? 1.0f : fmaxf(largest, kSmallestMax) / kLargest;
}

struct Sum {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};
struct Most {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over `kLanes` neighbouring threads, a power of two; each has the result.
template <int kLanes = 32, class T, class Combine>
__device__ inline T warp_combine(T x, Combine combine) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
    return x;
}

// Over a block of whole warps, of numbers that 0 changes nothing in; each thread has the result. `scratch` is shared memory of a
// number a warp that no other call uses.
template <class T, class Combine>
__device__ inline T block_combine(T x, Combine combine, T* scratch) {
    x = warp_combine(x, combine);
    if (blockDim.x == 32) return x;
    const unsigned lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_combine(lane < warps ? scratch[lane] : T(0), combine);
}
template <class T>
__device__ inline T block_sum(T x, T* scratch) {
    return block_combine(x, Sum(), scratch);
}
// Of numbers that are not negative.
__device__ inline float block_max(float x, float* scratch) { return block_combine(x, Most(), scratch); }

// Of two numbers at once, with 64 floats: threads wait for each other once.
template <class First, class Second>
__device__ inline void block_combine(float& first, First of_first, float& second, Second of_second, float* scratch) {
    first = warp_combine(first, of_first);
    second = warp_combine(second, of_second);
    if (blockDim.x == 32) return;
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    if (lane == 0) scratch[warp] = first, scratch[32 + warp] = second;
    __syncthreads();
    first = warp_combine(lane < warps ? scratch[lane] : 0.0f, of_first);
    second = warp_combine(lane < warps ? scratch[32 + lane] : 0.0f, of_second);
}

// Calls f with a null pointer to the type.
template <class F>
cudaError_t with_type(Type type, F&& f) {
    switch (type) {
        case Type::float32:
            return f(static_cast<float*>(nullptr));
        case Type::float16:
            return f(static_cast<__half*>(nullptr));
        default:
            return f(static_cast<__nv_bfloat16*>(nullptr));
    }
}

}  // namespace diffusionz::kernels
