// Queries and keys of a fused product, in place: each head h of a token becomes
//
//   n = h / sqrt(mean(h^2) + eps) * weight,   then pairs (a, b) of n become (a cos - b sin, b cos + a sin)
//
// with pairs (n[2i], n[2i + 1]) or (n[i], n[i + head_dim / 2]) (Su et al. 2021).
//
// A block a token, or a few for a token where there are few of them. A head belongs to a group of neighbouring threads, each with
// one vector of either half of the head: so both kinds of pairs lie in one thread, and the sum of squares is a few shuffles. A
// thread has the same place in all its heads, so it reads its angles once, and it loads several heads before it needs the first.
//
// Numbers: float32, rounded once at the end. Limits: head_dim a multiple of 32 bytes, at most 1024 bytes.
// Reference: ops/qk_norm_rope.cc.

#include <algorithm>

#include "kernels/qk_norm_rope.h"
#include "kernels/rows.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kHeadsAtOnce = 2;
constexpr int64_t kBlocksWanted = 512;  // fewer leave processors idle

__device__ inline float group_sum(float x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

__device__ inline void rotate(float& a, float& b, float2 turn) {
    const float first = a;
    a = first * turn.x - b * turn.y;
    b = b * turn.x + first * turn.y;
}

template <class T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads)
    qk_norm_rope_kernel(T* qkv, int64_t row_stride, int tokens, int heads, int all_heads, int half, int lanes, const T* q_weight,
                        const T* k_weight, float eps, const float2* table) {
    using Numbers = Vector<T>;
    constexpr int N = Numbers::kCount;
    between_kernels();
    const int place = threadIdx.x % lanes, groups = kThreads / lanes * gridDim.y, vectors = half / N;
    const bool active = place < vectors;
    T* row = qkv + blockIdx.x * row_stride;

    // The angles of this thread's pairs: of the vector in the first half, then of the one in the second; or of both together.
    float2 turns[N] = {};
    if (active) {
        const float2* angles = table + static_cast<int64_t>(blockIdx.x % tokens) * half;
#pragma unroll
        for (int i = 0; i < N; ++i)
            turns[i] = kInterleaved ? angles[(i / (N / 2)) * (half / 2) + place * (N / 2) + i % (N / 2)] : angles[place * N + i];
    }

    // Whole warps stay together in this loop, as the shuffles ask.
    for (int begin = 0; begin < all_heads; begin += groups * kHeadsAtOnce) {
        const int first_head = begin + blockIdx.y * (kThreads / lanes) + threadIdx.x / lanes;
        Numbers lower[kHeadsAtOnce], upper[kHeadsAtOnce];
#pragma unroll
        for (int h = 0; h < kHeadsAtOnce; ++h) {
            const int head = first_head + h * groups;
            if (!active || head >= all_heads) continue;
            const T* numbers = row + static_cast<int64_t>(head) * 2 * half;
            lower[h] = load<T, N>(numbers, place);
            upper[h] = load<T, N>(numbers, vectors + place);
        }
#pragma unroll
        for (int h = 0; h < kHeadsAtOnce; ++h) {
            const int head = first_head + h * groups;
            const bool mine = active && head < all_heads;
            float a[N] = {}, b[N] = {};
            if (mine) {
#pragma unroll
                for (int i = 0; i < N; ++i) a[i] = to_float(lower[h].values[i]), b[i] = to_float(upper[h].values[i]);
            }
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < N; ++i) sum += a[i] * a[i] + b[i] * b[i];
            const float inverse = rsqrtf(group_sum(sum, lanes) / static_cast<float>(2 * half) + eps);
            if (!mine) continue;
            if (const T* weight = head < heads ? q_weight : k_weight) {
                const auto first = load<T, N>(weight, place), second = load<T, N>(weight, vectors + place);
#pragma unroll
                for (int i = 0; i < N; ++i) {
                    a[i] *= inverse * to_float(first.values[i]);
                    b[i] *= inverse * to_float(second.values[i]);
                }
            }
            if constexpr (kInterleaved) {
#pragma unroll
                for (int i = 0; i < N / 2; ++i) {
                    rotate(a[2 * i], a[2 * i + 1], turns[i]);
                    rotate(b[2 * i], b[2 * i + 1], turns[N / 2 + i]);
                }
            } else {
#pragma unroll
                for (int i = 0; i < N; ++i) rotate(a[i], b[i], turns[i]);
            }
            T* numbers = row + static_cast<int64_t>(head) * 2 * half;
            store(numbers, place, a);
            store(numbers, vectors + place, b);
        }
    }
}

}  // namespace

cudaError_t qk_norm_rope(Type type, void* qkv, int64_t rows, int64_t row_stride, int64_t tokens, int64_t heads, int64_t kv_heads,
                         int64_t head_dim, const void* q_weight, const void* k_weight, float eps, const void* table,
                         bool interleaved, cudaStream_t stream) {
    if (rows == 0) return cudaSuccess;
    return with_type(type, [&](auto* tag) {
        using T = std::remove_pointer_t<decltype(tag)>;
        constexpr int64_t N = Vector<T>::kCount;
        if (head_dim % (2 * N) != 0 || head_dim / (2 * N) > 32 || !tiles<T>(head_dim, {qkv, q_weight, k_weight}, {row_stride}))
            return cudaErrorNotSupported;
        int lanes = 1;
        while (lanes * 2 * N < head_dim) lanes *= 2;
        const int64_t turns = (heads + kv_heads) * lanes / kThreads + 1;
        const dim3 blocks(static_cast<unsigned>(rows),
                          static_cast<unsigned>(std::clamp<int64_t>(kBlocksWanted / rows, 1, turns)));
        return launch(interleaved ? qk_norm_rope_kernel<T, true> : qk_norm_rope_kernel<T, false>, blocks, kThreads, 0, stream,
                      /*overlapped=*/true, static_cast<T*>(qkv), row_stride, static_cast<int>(tokens), static_cast<int>(heads),
                      static_cast<int>(heads + kv_heads), static_cast<int>(head_dim / 2), lanes, static_cast<const T*>(q_weight),
                      static_cast<const T*>(k_weight), eps, static_cast<const float2*>(table));
    });
}

}  // namespace diffusionz::kernels
