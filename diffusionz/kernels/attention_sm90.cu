// y = softmax(scale q k^T) v for heads of 128 numbers, on Hopper.
//
// A persistent block on each multiprocessor takes tile after tile: 192 queries of one head, 64 for each of three warpgroups,
// which go through the head's keys together (Dao 2022; Shah et al. 2024). One thread loads (tensor memory accelerator, 128-byte
// swizzle, rings of keys and of values). Logits and sums stay in registers: q k^T from shared memory, then the weights, rounded,
// are the other product's factor from the registers they are in. A group sends off the logits of the next keys and
// the sums of the last ones together; its exponentials run while its own sums and the other groups' products do. Turns at the
// tensor cores, by barriers, were 1.5 % slower.
//
// 192 queries and 80 keys cut Z-Image's 4160 tokens and 30 heads into 660 tiles, five whole waves of 132 multiprocessors, and 52
// whole steps. On an H100, one after the other: 660 TFLOP/s there, in a step under the power limit 585, where cuDNN reaches 480.
//
// Numbers: logits and sums in the tensor cores' float32, the largest logit so far subtracted, exponentials by the hardware's 2^x,
// weights rounded to bfloat16 for the second product, their sum of the unrounded ones; one rounding at the end. Nothing depends
// on which block is first. Limits: in attention_sm90.h. Reference: at::scaled_dot_product_attention in ops/attention.cc.

#include <algorithm>
#include <cmath>

#include "kernels/attention_sm90.h"
#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "kernels/tensor_map.h"

namespace diffusionz::kernels {
namespace {

constexpr int kGroups = 3, kRows = 64, kQueries = kGroups * kRows, kHead = 128, kBox = 64;  // a box: columns of 128 bytes
constexpr int kThreads = (kGroups + 1) * 128;
constexpr int kRowsBytes = kRows * kHead * 2;  // of a group's queries, and of its results

template <int kKeys_, int kStages_>
struct Cut {
    static constexpr int kKeys = kKeys_, kStages = kStages_;
    static constexpr int kBoxBytes = kKeys * kBox * 2, kStageBytes = 2 * kBoxBytes;
    static constexpr int kBarriers = 2 * kGroups + 4 * kStages;
    static constexpr int kSharedBytes = 1024 + 2 * kGroups * kRowsBytes + 2 * kStages * kStageBytes + kBarriers * 8;
    static_assert(kKeys % 16 == 0 && kSharedBytes <= 232448);
};

struct Sizes {
    int queries, keys, heads, repeats, tiles, query_tiles;
    float scale;  // times log2(e)
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t pack(float a, float b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
}

// Of the four threads that share a row.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Where things lie in shared memory, and where a tile is.
template <class C>
struct Block {
    uint32_t q, y, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty;

    __device__ __forceinline__ explicit Block(uint32_t shared) {
        q = (shared + 1023) & ~1023u;
        y = q + kGroups * kRowsBytes;
        k = y + kGroups * kRowsBytes;
        v = k + C::kStages * C::kStageBytes;
        q_full = v + C::kStages * C::kStageBytes;
        q_empty = q_full + 8 * kGroups;
        k_full = q_empty + 8 * kGroups;
        k_empty = k_full + 8 * C::kStages;
        v_full = k_empty + 8 * C::kStages;
        v_empty = v_full + 8 * C::kStages;
    }
};

struct Place {
    int row, head, batch;
    __device__ __forceinline__ Place(int tile, const Sizes& sizes) {
        const int of_head = tile / sizes.query_tiles;
        row = (tile - of_head * sizes.query_tiles) * kQueries;
        batch = of_head / sizes.heads;
        head = of_head - batch * sizes.heads;
    }
};

template <class C>
__device__ __forceinline__ void produce(const Block<C>& block, const CUtensorMap* map_q, const CUtensorMap* map_k,
                                        const CUtensorMap* map_v, const Sizes& sizes) {
    Ring<C::kStages> ring;
    uint32_t tile_parity = 0;
    for (int tile = blockIdx.x; tile < sizes.tiles; tile += gridDim.x, tile_parity ^= 1) {
        const Place place(tile, sizes);
        const int column = place.head * kHead, kv_column = place.head / sizes.repeats * kHead;
        const auto load = [&](uint32_t to, uint32_t full, uint32_t empty, const CUtensorMap* map, int key) {
            barrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
            barrier_expect(full + 8 * ring.stage, C::kStageBytes);
            for (int half = 0; half < 2; ++half)
                tma_load(to + ring.stage * C::kStageBytes + half * C::kBoxBytes, map, full + 8 * ring.stage,
                         kv_column + half * kBox, key, place.batch);
        };
        for (int key = 0; key < sizes.keys; key += C::kKeys) {
            load(block.k, block.k_full, block.k_empty, map_k, key);
            if (key == 0) {
                for (int group = 0; group < kGroups; ++group) {
                    barrier_wait(block.q_empty + 8 * group, tile_parity ^ 1);
                    barrier_expect(block.q_full + 8 * group, kRowsBytes);
                    for (int half = 0; half < 2; ++half)
                        tma_load(block.q + group * kRowsBytes + half * (kRowsBytes / 2), map_q, block.q_full + 8 * group,
                                 column + half * kBox, place.row + group * kRows, place.batch);
                }
            }
            load(block.v, block.v_full, block.v_empty, map_v, key);
            ring.next();
        }
    }
}

template <class C>
__device__ __forceinline__ void consume(const Block<C>& block, const CUtensorMap* map_y, const Sizes& sizes, int group) {
    constexpr int kKeys = C::kKeys, kLogits = kKeys / 2;  // a thread's
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const bool leader = threadIdx.x % 128 == 0;
    const uint32_t q = block.q + group * kRowsBytes, y = block.y + group * kRowsBytes;
    const auto release = [&](uint32_t barrier) {
        if (lane == 0) barrier_arrive(barrier);
    };
    Ring<C::kStages> ring_k, ring_v;
    uint32_t tile_parity = 0;
    const int steps = (sizes.keys + kKeys - 1) / kKeys;
    float logits[kLogits], sums[64];
    uint32_t weights[kLogits / 8][4];
    for (int tile = blockIdx.x; tile < sizes.tiles; tile += gridDim.x, tile_parity ^= 1) {
        const Place place(tile, sizes);
        float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

        const auto multiply_keys = [&] {
            const uint32_t k = block.k + ring_k.stage * C::kStageBytes;
#pragma unroll
            for (int i = 0; i < kHead / 16; ++i) {
                // Four steps of 32 bytes along a box's rows, then the next box.
                const uint64_t a = wgmma_descriptor(q + i / 4 * (kRowsBytes / 2)) + 2 * (i % 4);
                const uint64_t b = wgmma_descriptor(k + i / 4 * C::kBoxBytes) + 2 * (i % 4);
                Wgmma<__nv_bfloat16, kKeys>::run(logits, a, b, i);
            }
        };
        const auto multiply_values = [&](bool first) {
            const uint64_t v = wgmma_descriptor_across(block.v + ring_v.stage * C::kStageBytes, C::kBoxBytes);
#pragma unroll
            for (int i = 0; i < kKeys / 16; ++i) wgmma_from_registers(sums, weights[i], v + 128 * i, !first || i > 0);
        };
        // From logits to weights, unrounded; what the sums so far are to be multiplied by.
        float factor[2];
        const auto weigh = [&](int step) {
            if (step + 1 == steps && sizes.keys % kKeys != 0) {
#pragma unroll
                for (int i = 0; i < kLogits; ++i) {
                    const int key = step * kKeys + i / 4 * 8 + lane % 4 * 2 + i % 2;
                    if (key >= sizes.keys) logits[i] = -INFINITY;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float most = largest[half];
#pragma unroll
                for (int i = 2 * half; i < kLogits; i += 4) most = fmaxf(most, fmaxf(logits[i], logits[i + 1]));
                most = row_max(most);
                const float shift = most * sizes.scale;
                factor[half] = exp2_approx(largest[half] * sizes.scale - shift);
                largest[half] = most;
                float sum = 0.0f;
#pragma unroll
                for (int i = 2 * half; i < kLogits; i += 4) {
                    logits[i] = exp2_approx(logits[i] * sizes.scale - shift);
                    logits[i + 1] = exp2_approx(logits[i + 1] * sizes.scale - shift);
                    sum += logits[i] + logits[i + 1];
                }
                total[half] = total[half] * factor[half] + sum;
            }
        };
        const auto round = [&] {
#pragma unroll
            for (int i = 0; i < kLogits; i += 2) weights[i / 8][i % 8 / 2] = pack(logits[i], logits[i + 1]);
        };

        barrier_wait(block.q_full + 8 * group, tile_parity);
        barrier_wait(block.k_full + 8 * ring_k.stage, ring_k.parity);
        wgmma_fence();
        multiply_keys();
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (float& logit : logits) pin(logit);
        release(block.k_empty + 8 * ring_k.stage);
        ring_k.next();
        weigh(0);
        round();
        for (int step = 1; step < steps; ++step) {
            barrier_wait(block.k_full + 8 * ring_k.stage, ring_k.parity);
            barrier_wait(block.v_full + 8 * ring_v.stage, ring_v.parity);
#pragma unroll
            for (float& sum : sums) pin(sum);
            wgmma_fence();
            multiply_keys();
            wgmma_commit();
            multiply_values(step == 1);
            wgmma_commit();
            wgmma_wait<1>();
#pragma unroll
            for (float& logit : logits) pin(logit);
            release(block.k_empty + 8 * ring_k.stage);
            ring_k.next();
            weigh(step);
            wgmma_wait<0>();
#pragma unroll
            for (float& sum : sums) pin(sum);
            release(block.v_empty + 8 * ring_v.stage);
            ring_v.next();
#pragma unroll
            for (int i = 0; i < 64; ++i) sums[i] *= factor[i / 2 % 2];
            round();
        }
        release(block.q_empty + 8 * group);
        barrier_wait(block.v_full + 8 * ring_v.stage, ring_v.parity);
#pragma unroll
        for (float& sum : sums) pin(sum);
        wgmma_fence();
        multiply_values(steps == 1);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (float& sum : sums) pin(sum);
        release(block.v_empty + 8 * ring_v.stage);
        ring_v.next();

        const float inverse[2] = {1.0f / row_sum(total[0]), 1.0f / row_sum(total[1])};
        if (leader) tma_store_wait<0>();
        named_barrier_sync(1 + group, 128);
        const int row = warp * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
        for (int i = 0; i < 16; i += 2) {  // 8 columns each
            const int vector = i + lane / 16;
            const uint32_t to = y + vector / 8 * (kRowsBytes / 2) + row * 128 + (vector % 8 ^ row % 8) * 16;
            const float* from = sums + 4 * i;
            store_matrices(to, pack(from[0] * inverse[0], from[1] * inverse[0]), pack(from[2] * inverse[1], from[3] * inverse[1]),
                           pack(from[4] * inverse[0], from[5] * inverse[0]), pack(from[6] * inverse[1], from[7] * inverse[1]));
        }
        async_proxy_fence();
        named_barrier_sync(1 + group, 128);
        if (leader && place.row + group * kRows < sizes.queries) {
            for (int half = 0; half < 2; ++half)
                tma_store(map_y, y + half * (kRowsBytes / 2), place.head * kHead + half * kBox, place.row + group * kRows,
                          place.batch);
        }
        __syncwarp();
    }
    if (leader) tma_store_wait<0>();
    __syncwarp();
}

#endif

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    attention_kernel(const __grid_constant__ CUtensorMap map_q, const __grid_constant__ CUtensorMap map_k,
                     const __grid_constant__ CUtensorMap map_v, const __grid_constant__ CUtensorMap map_y, const Sizes sizes) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t shared[];
    const Block<C> block(shared_address(shared));
    if (threadIdx.x == 0) {
        for (int i = 0; i < kGroups; ++i) {
            barrier_init(block.q_full + 8 * i, 1);
            barrier_init(block.q_empty + 8 * i, 4);  // a group's warps
        }
        for (int i = 0; i < C::kStages; ++i) {
            for (const uint32_t full : {block.k_full, block.v_full}) barrier_init(full + 8 * i, 1);
            for (const uint32_t empty : {block.k_empty, block.v_empty}) barrier_init(empty + 8 * i, 4 * kGroups);
        }
        barrier_init_fence();
    }
    __syncthreads();
    wait_for_the_kernel_before();
    start_the_kernel_after();
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // a warp's, as the compiler can then tell
    if (group == kGroups) {
        registers_down<kProducerRegisters>();
        if (threadIdx.x == kGroups * 128) produce(block, &map_q, &map_k, &map_v, sizes);
        __syncwarp();
    } else {
        registers_up<kConsumerRegisters>();
        consume(block, &map_y, sizes, group);
    }
#endif
}

template <class C>
cudaError_t run(const AttentionSm90& call, int multiprocessors, cudaStream_t stream) {
    const auto map = [&](CUtensorMap* map, const Rows& x, int64_t tokens, int64_t heads, int rows) {
        // A single batch has no stride that counts; the map wants one.
        const int64_t outer = call.batch > 1 ? x.outer_stride : tokens * x.inner_stride;
        return describe(map, x.data, {heads * kHead, tokens, call.batch}, {x.inner_stride, outer}, {kBox, rows, 1});
    };
    CUtensorMap q, k, v, y;
    const int64_t width = call.heads * kHead;
    if (!map(&q, call.q, call.queries, call.heads, kRows) || !map(&k, call.k, call.keys, call.kv_heads, C::kKeys) ||
        !map(&v, call.v, call.keys, call.kv_heads, C::kKeys) ||
        !map(&y, Rows{call.y, call.queries * width, width}, call.queries, call.heads, kRows))
        return cudaErrorNotSupported;
    Sizes sizes{};
    sizes.queries = static_cast<int>(call.queries);
    sizes.keys = static_cast<int>(call.keys);
    sizes.heads = static_cast<int>(call.heads);
    sizes.repeats = static_cast<int>(call.heads / call.kv_heads);
    sizes.query_tiles = (sizes.queries + kQueries - 1) / kQueries;
    sizes.tiles = static_cast<int>(call.batch) * sizes.heads * sizes.query_tiles;
    sizes.scale = call.scale * 1.4426950408889634f;
    const cudaError_t error =
        cudaFuncSetAttribute(attention_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
    if (error != cudaSuccess) return error;
    return launch(attention_kernel<C>, std::min(multiprocessors, sizes.tiles), kThreads, C::kSharedBytes, stream,
                  /*overlapped=*/true, q, k, v, y, sizes);
}

}  // namespace

cudaError_t attention_sm90(const AttentionSm90& call, int multiprocessors, cudaStream_t stream) {
    if (call.batch == 0 || call.queries == 0 || call.keys == 0) return cudaErrorNotSupported;
    return run<Cut<80, 3>>(call, multiprocessors, stream);
}

}  // namespace diffusionz::kernels
