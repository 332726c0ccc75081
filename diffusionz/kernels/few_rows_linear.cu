// y = f x W^T for so few rows that latency is what takes time: a layer of Chronos-2 for one series is five of these in a row and
// an attention, each shorter than what a launch and a library's product take. What stands around the products is in them: the
// norm before, relu or the sum with the residual stream after.
//
// The norm's weight is part of W. Its factor is a number a row, so it follows the product, and x is the stream itself in 16 bits,
// times a power of two a row that keeps it near 1 and is divided out again. That power follows from the stream one sum earlier,
// whose squares are known to whoever writes the stream, while the stream's own are known only when all of its columns are.
//
// A cluster of up to 8 blocks has 64 rows of 64 outputs and shares the depth. Each block asks for its part of W before it waits
// for the kernel that writes x (with overlapped launches W comes while that one works), then for x, both by the tensor memory
// accelerator in the 128-byte swizzle; the four warps of the block multiply (wgmma, sums in registers). Every block finishes a
// share of the rows: the others copy theirs into its shared memory, and it adds them up in their order. All that a block holds,
// 112 KB at most, leaves room for a block of the next launch on the same multiprocessor.
//
// Numbers: products exact, sums, factors and the stream in float32, one rounding to 16 bits. The order of sums depends on the
// sizes of W alone and a row on nothing but itself, so the bytes are the same in every run and in any company. In 16 bits there
// is room for a sum whose largest number is 30,000 times its row's root mean square before (of float16; a row below sqrt(epsilon)
// counts as that). Limits: in few_rows_linear.h. Reference: ops/few_rows_linear.cc.

#include <algorithm>

#include "kernels/few_rows_linear.h"
#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "kernels/mma.cuh"
#include "kernels/tensor_map.h"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kRows = 64, kColumns = static_cast<int>(kFewRowsColumns), kThreads = 128;
constexpr int kRowBytes = 128, kBox = kRowBytes / 2;  // of the swizzle; columns of a box
constexpr int kDepthMax = 384;                        // of one block
constexpr int kPitch = kColumns + 8;                  // of sums, in floats: rows of a store fall on different banks
constexpr int kWeightBytes = kColumns * kRowBytes;    // of a box

// k, where 4^k is at most the row's mean square, and more than a quarter of it; what the norm takes for 0 has a place to grow
// from.
__device__ __forceinline__ int half_exponent(float mean, float epsilon) {
    return ((__float_as_int(fmaxf(mean, epsilon)) >> 23) - 127) >> 1;
}
__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((127 + exponent) << 23); }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The address of the same place in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint32_t address_in(uint32_t own, uint32_t rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(own), "r"(rank));
    return there;
}

// Bytes of this block to another block of the cluster, whose barrier there counts them. What they were written with before: a
// fence to the asynchronous proxy. They must stay until they have arrived.
__device__ __forceinline__ void copy_to_block(uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(to),
                 "r"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// A row's mean square, by kLanes neighbouring threads; 0 for none.
template <int kLanes>
__device__ __forceinline__ float mean_square(const RowSquares& squares, int64_t row, bool there, float inverse_width) {
    constexpr int kEach = kRowSquaresPitch / kLanes;
    const int first = threadIdx.x % kLanes * kEach;
    float sum = 0.0f;
    if (there && squares.data) {
        const auto parts = load<float, kEach>(squares.data + row * kRowSquaresPitch, threadIdx.x % kLanes);
#pragma unroll
        for (int i = 0; i < kEach; ++i) sum += first + i < squares.parts ? parts.values[i] : 0.0f;
    }
    return warp_combine<kLanes>(sum, Sum()) * inverse_width;
}

#endif

// What a block holds in shared memory, from a multiple of 1024 on.
struct Places {
    int rows, inbox, factors, barriers, bytes;  // W stands first

    // Of `boxes` boxes of the depth. x has `box_rows` rows in a box; the product reads 64, whatever stands behind them.
    __host__ __device__ Places(int boxes, int box_rows, int own_rows) {
        rows = boxes * kWeightBytes;
        inbox = rows + boxes * box_rows * kRowBytes;
        if (inbox < kRows * kPitch * 4) inbox = kRows * kPitch * 4;  // own sums take the factors' place
        factors = inbox + kRows * kPitch * 4;
        barriers = factors + 2 * own_rows * 4;
        bytes = barriers + 3 * 8;
    }
};

template <class T, int kParts>
__global__ void __launch_bounds__(kThreads)
    few_rows_kernel(const __grid_constant__ CUtensorMap map_w, const __grid_constant__ CUtensorMap map_x, const FewRowsLinear p,
                    const int boxes, const int box_rows) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t shared[];
    constexpr int kOwn = kRows / kParts, kShareBytes = kOwn * kPitch * 4;  // rows that a block finishes
    const Places places(boxes, box_rows, kOwn);
    uint8_t* memory = shared + (1024 - shared_address(shared) % 1024) % 1024;
    const uint32_t base = shared_address(memory), weights = base, rows = base + places.rows;
    float *sums = reinterpret_cast<float*>(memory), *inbox = reinterpret_cast<float*>(memory + places.inbox);
    float *factors = reinterpret_cast<float*>(memory + places.factors), *powers = factors + kOwn;
    const uint32_t full_w = base + places.barriers, full_x = full_w + 8, full_inbox = full_w + 16;
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int part = blockIdx.x % kParts, tile = blockIdx.x / kParts, first_column = tile * kColumns;
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows, first_own = first_row + part * kOwn;
    const int first_depth = part * boxes * kBox;
    start_the_kernel_after();
    if (thread == 0) {
        for (int i = 0; i < 3; ++i) barrier_init(full_w + 8 * i, 1);
        barrier_init_fence();
        barrier_expect(full_w, boxes * kWeightBytes);
        for (int i = 0; i < boxes; ++i)
            tma_load<false>(weights + i * kWeightBytes, &map_w, full_w, first_depth + i * kBox, first_column);
        barrier_expect(full_inbox, first_own < p.rows ? (kParts - 1) * kShareBytes : 0);
    }
    cluster_arrive();
    wait_for_the_kernel_before();
    if (thread == 0) {
        barrier_expect(full_x, boxes * box_rows * kRowBytes);
        for (int i = 0; i < boxes; ++i)
            tma_load<false>(rows + i * box_rows * kRowBytes, &map_x, full_x, first_depth + i * kBox, static_cast<int>(first_row));
    }

    // While x comes: what the end needs. A thread finishes four columns of one or several rows.
    constexpr int kVectors = kColumns / 4, kEach = kOwn * kVectors / kThreads;
    static_assert(kOwn * kVectors % kThreads == 0);
    const auto own_row = [&](int i) { return (thread + i * kThreads) / kVectors; };
    const int column = thread % kVectors * 4;
    float4 before[kEach] = {};
    if (p.sum) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const int64_t row = first_own + own_row(i);
            if (row < p.rows) before[i] = *reinterpret_cast<const float4*>(p.sum + row * p.columns + first_column + column);
        }
    }
    constexpr int kLanes = kThreads / kOwn;
    {
        const int own = thread / kLanes;
        const bool there = first_own + own < p.rows;
        const float mean = mean_square<kLanes>(p.squares, first_own + own, there, p.inverse_width);
        const float scale = mean_square<kLanes>(p.scale_squares, first_own + own, there, p.inverse_width);
        if (thread % kLanes == 0) {
            factors[own] = p.scale_squares.data ? rsqrtf(mean + p.epsilon) * power_of_two(half_exponent(scale, p.epsilon)) : 1.0f;
            powers[own] = power_of_two(-half_exponent(mean, p.epsilon));
        }
    }

    float sum[kColumns / 2] = {};
    barrier_wait(full_w, 0);
    barrier_wait(full_x, 0);
    wgmma_fence();
#pragma unroll 1
    for (int box = 0; box < boxes; ++box) {
        const uint64_t x = wgmma_descriptor(rows + box * box_rows * kRowBytes),
                       w = wgmma_descriptor(weights + box * kWeightBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) Wgmma<T, kColumns>::run(sum, x + 2 * i, w + 2 * i, 1);
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) pin(sum[i]);

    __syncthreads();  // all have read W and x
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float* to = &sums[(warp * 16 + half * 8 + lane / 4) * kPitch + lane % 4 * 2];
#pragma unroll
        for (int i = 0; i < kColumns / 8; ++i)
            *reinterpret_cast<float2*>(to + i * 8) = {sum[4 * i + half * 2], sum[4 * i + half * 2 + 1]};
    }
    async_proxy_fence();
    cluster_wait();  // all blocks' barriers are there
    __syncthreads();
    if (thread < kParts && thread != part && first_row + thread * kOwn < p.rows)
        copy_to_block(address_in(base + places.inbox + part * kShareBytes, thread), base + thread * kShareBytes, kShareBytes,
                      address_in(full_inbox, thread));
    barrier_wait(full_inbox, 0);
    cluster_arrive();

#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int own = own_row(i);
        const bool there = first_own + own < p.rows;
        float4 total = {};
        if (there) {
#pragma unroll
            for (int from = 0; from < kParts; ++from) {
                const float* share = from == part ? sums : inbox;
                const float4 some = *reinterpret_cast<const float4*>(&share[(from * kOwn + own) * kPitch + column]);
                total = {total.x + some.x, total.y + some.y, total.z + some.z, total.w + some.w};
            }
            const float factor = factors[own];
            total = {total.x * factor, total.y * factor, total.z * factor, total.w * factor};
        }
        const int64_t at = (first_own + own) * p.columns + first_column + column;
        if (p.sum) {
            total = {total.x + before[i].x, total.y + before[i].y, total.z + before[i].z, total.w + before[i].w};
            const float square =
                warp_combine<kVectors>(total.x * total.x + total.y * total.y + total.z * total.z + total.w * total.w, Sum());
            if (there) {
                *reinterpret_cast<float4*>(p.sum + at) = total;
                if (column == 0) p.sum_squares[(first_own + own) * kRowSquaresPitch + tile] = square;
                const float power = powers[own];
                total = {total.x * power, total.y * power, total.z * power, total.w * power};
            }
        } else if (p.relu) {
            total = {fmaxf(total.x, 0.0f), fmaxf(total.y, 0.0f), fmaxf(total.z, 0.0f), fmaxf(total.w, 0.0f)};
        }
        if (there) *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + at) = {pack<T>(total.x, total.y), pack<T>(total.z, total.w)};
    }
    cluster_wait();  // others have what this block sent them
#endif
}

template <class T, int kParts>
cudaError_t run(const FewRowsLinear& p, cudaStream_t stream) {
    const int boxes = static_cast<int>(p.depth / (kParts * kBox)),
              box_rows = static_cast<int>(std::min<int64_t>((p.rows + 7) / 8 * 8, kRows));
    CUtensorMap w, x;
    if (!describe(&w, p.weight, {p.depth, p.columns}, {p.depth}, {kBox, kColumns}) ||
        !describe(&x, p.x, {p.depth, p.rows}, {p.depth}, {kBox, box_rows}))
        return cudaErrorNotSupported;
    constexpr int kBytesMax = 116 * 1024;
    const cudaError_t error =
        cudaFuncSetAttribute(few_rows_kernel<T, kParts>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytesMax);
    if (error != cudaSuccess) return error;
    const dim3 blocks(static_cast<unsigned>(p.columns / kColumns * kParts), static_cast<unsigned>((p.rows + kRows - 1) / kRows));
    const size_t bytes = 1024 + Places(boxes, box_rows, kRows / kParts).bytes;
    return launch_clusters(kParts, few_rows_kernel<T, kParts>, blocks, kThreads, bytes, stream, w, x, p, boxes, box_rows);
}

template <class T>
cudaError_t run(const FewRowsLinear& p, int parts, cudaStream_t stream) {
    switch (parts) {
        case 1:
            return run<T, 1>(p, stream);
        case 2:
            return run<T, 2>(p, stream);
        case 4:
            return run<T, 4>(p, stream);
        case 8:
            return run<T, 8>(p, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

// A warp a row.
template <class T>
__global__ void scale_kernel(ScaledRows p) {
    start_the_kernel_after();
    wait_for_the_kernel_before();
    const int64_t row = blockIdx.x;
    const float* x = p.x + row * p.width;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < p.width; i += 32) sum += x[i] * x[i];
    sum = warp_combine(sum, Sum());
    const float power = power_of_two(-half_exponent(sum / static_cast<float>(p.width), p.epsilon));
    if (threadIdx.x == 0) p.squares[row * kRowSquaresPitch] = sum;
    for (int64_t i = threadIdx.x; i < p.width; i += 32) static_cast<T*>(p.y)[row * p.width + i] = from_float<T>(x[i] * power);
}

}  // namespace

int few_rows_linear_parts(int64_t columns, int64_t depth, int compute_capability) {
    if (compute_capability != 90 || columns % kColumns != 0) return 0;
    for (const int parts : {1, 2, 4, 8}) {
        if (depth % (parts * kBox) == 0 && depth / parts <= kDepthMax) return parts;
    }
    return 0;
}

cudaError_t few_rows_linear(const FewRowsLinear& p, int parts, cudaStream_t stream) {
    if (p.rows == 0) return cudaSuccess;
    switch (p.type) {
        case Type::float16:
            return run<__half>(p, parts, stream);
        case Type::bfloat16:
            return run<__nv_bfloat16>(p, parts, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

cudaError_t scale_rows(const ScaledRows& p, cudaStream_t stream) {
    if (p.rows == 0) return cudaSuccess;
    const auto blocks = dim3(static_cast<unsigned>(p.rows));
    switch (p.type) {
        case Type::float16:
            return launch(scale_kernel<__half>, blocks, 32, 0, stream, /*overlapped=*/true, p);
        case Type::bfloat16:
            return launch(scale_kernel<__nv_bfloat16>, blocks, 32, 0, stream, /*overlapped=*/true, p);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace diffusionz::kernels
