// y = x W^T (bfloat16, or float8_e4m3fn with a scale a row of each factor), and y = silu(x W1^T) * (x W3^T), on Hopper.
//
// A persistent block on each multiprocessor takes tile after tile of y. One thread loads (tensor memory accelerator, 128-byte
// swizzle, a ring of stages in shared memory); two or three warpgroups multiply (wgmma, both factors from shared memory, sums in
// registers) and store (stmatrix, then the accelerator, which clips at y's edges). Two blocks, a cluster, work on tiles side by
// side; of the factor that they share each loads one half, for both. The warpgroups start a few steps apart and stay so: while one
// stores its tile the others keep the tensor cores busy.
//
// The side of y whose rows feed wgmma's 64-row operand ("A") is x or W: W's rows are multiples of every tile, and the other
// operand's height can be any multiple of 8, so that few tokens are cut into tiles that fill whole waves of multiprocessors.
// Tiles are numbered along B first, `group` of them, so that what a wave reads stays in the second-level cache.
//
// Numbers: products exact, sums in the tensor cores' float32 (FP8: the cores' shorter sums, as cuBLAS's fast accumulation), scales
// and gate in float32, one rounding to bfloat16. The tile, and with it the order of the sums, follows from the sizes alone; no
// tile splits the depth, so all tiles give the same bytes.
// Limits: in gemm_sm90.h. Reference: at::linear, at::_scaled_mm and at::silu in ops/linear.cc and ops/gated_linear.cc.

#include "kernels/gemm_sm90.h"

#include <algorithm>

#include "kernels/hopper.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kRowBytes = 128;  // of a stage's rows: the width of the swizzle
constexpr int kCluster = 2;
constexpr int kGroup = 8;
constexpr int kLead = 1;

// Which side of y a cluster's two tiles share.
enum class Share { a, b };

// kTransposed: A is W and B is x. kGroups warpgroups of kBlocks times 64 rows of A each; kN rows of B. Stored in chunks of 64
// columns and kChunkRows rows of y, of which a warpgroup has kChunks buffers.
template <class T_, bool kTransposed_, bool kGated_, Share kShare_, int kGroups_, int kBlocks_, int kN_, int kStages_, int kChunkRows_,
          int kChunks_>
struct Config {
    using T = T_;
    static constexpr bool kTransposed = kTransposed_, kGated = kGated_, kScaled = sizeof(T) == 1;
    // A gated tile holds as many rows of W1 as of W3, in W1's part first.
    static constexpr bool kGatedA = kGated && kTransposed, kGatedB = kGated && !kTransposed;
    static constexpr bool kSharesA = kShare_ == Share::a;
    static constexpr int kGroups = kGroups_, kBlocks = kBlocks_, kM = kGroups * kBlocks * 64, kN = kN_, kK = kRowBytes / sizeof(T);
    static constexpr int kStages = kStages_, kStageBytes = (kM + kN) * kRowBytes;
    static constexpr int kChunkRows = kChunkRows_, kChunks = kChunks_, kChunkBytes = kChunkRows * 128;
    static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kGroups * kChunks * kChunkBytes + kStages * 16;
    static constexpr int kThreads = (kGroups + 1) * 128;
    // The register file, shared out: 64 K registers over the threads at launch, then most of them to who multiplies.
    static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 32, kConsumerRegisters = kGroups == 2 ? 232 : 160;
    // y's tile, the part of it that a warpgroup computes along A, and the boxes that one load brings.
    static constexpr int kRowsA = kGatedA ? kM / 2 : kM, kRowsB = kGatedB ? kN / 2 : kN, kGroupRows = kGatedA ? 64 : kBlocks * 64;
    static constexpr int kBoxA = kSharesA || kGatedA ? kM / 2 : kM, kBoxB = !kSharesA || kGatedB ? kN / 2 : kN;
    static constexpr int kTilesA = kSharesA ? 1 : kCluster, kTilesB = kSharesA ? kCluster : 1;  // of a cluster

    static_assert(kSharedBytes <= 232448);
    static_assert(kStageBytes % 1024 == 0 && kBoxA % 8 == 0 && kBoxA <= 256 && kBoxB % 8 == 0 && kBoxB <= 256);
    static_assert(kTransposed ? kN % kChunkRows == 0 && kChunkRows % 8 == 0 : kChunkRows == 64 && kRowsB % 64 == 0);
    static_assert(!kGatedA || kBlocks == 2);
};

struct Sizes {
    int rows_a, rows_b;  // y's sides
    int depth;
    int half;   // where W3 begins in a gated weight
    int group;  // clusters' tiles along B before A goes on
    int lead;   // steps by which a warpgroup starts before the next
    const float* scales_a;
    const float* scales_b;
};

__device__ __forceinline__ uint32_t pack(float a, float b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What all roles know: where things lie in shared memory, and which tiles are this cluster's.
template <class C>
struct Block {
    uint32_t stages, chunks, full, empty, rank;
    int tiles_a, tiles_b, group, count, first, step, depth_steps;

    __device__ __forceinline__ Block(uint32_t shared, const Sizes& sizes) {
        stages = (shared + 1023) & ~1023u;
        chunks = stages + C::kStages * C::kStageBytes;
        full = chunks + C::kGroups * C::kChunks * C::kChunkBytes;
        empty = full + C::kStages * 8;
        rank = cluster_rank();
        tiles_a = (sizes.rows_a + C::kRowsA * C::kTilesA - 1) / (C::kRowsA * C::kTilesA);
        tiles_b = (sizes.rows_b + C::kRowsB * C::kTilesB - 1) / (C::kRowsB * C::kTilesB);
        group = min(sizes.group, tiles_b);
        count = tiles_a * tiles_b;
        first = blockIdx.x / kCluster;
        step = gridDim.x / kCluster;
        depth_steps = (sizes.depth + C::kK - 1) / C::kK;
    }
    // y's tile `index` begins here.
    __device__ __forceinline__ void at(int index, int& row_a, int& row_b) const {
        const int of_group = group * tiles_a, g = index / of_group, rest = index - g * of_group;
        const int width = min(group, tiles_b - g * group), a = rest / width, b = g * group + rest - a * width;
        row_a = (a * C::kTilesA + (C::kSharesA ? 0 : rank)) * C::kRowsA;
        row_b = (b * C::kTilesB + (C::kSharesA ? rank : 0)) * C::kRowsB;
    }
};

// One factor's part of a stage: kRows rows in boxes of kBox. Shared, this block loads its half for both; of a gated weight the
// second half of the rows lies at W3.
template <int kRows, bool kShared, bool kHalves>
__device__ __forceinline__ void load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int column, int row, int half, uint32_t rank) {
    constexpr uint32_t kHalf = kRows / 2;
    if constexpr (kShared) {
        tma_load_to_both(to + rank * kHalf * kRowBytes, map, barrier, column, row + rank * (kHalves ? half : kHalf));
    } else {
        tma_load(to, map, barrier, column, row);
        if constexpr (kHalves) tma_load(to + kHalf * kRowBytes, map, barrier, column, row + half);
    }
}

template <class C>
__device__ __forceinline__ void produce(const Block<C>& block, const CUtensorMap* map_a, const CUtensorMap* map_b, const Sizes& sizes) {
    int stage = 0;
    uint32_t parity = 0;
    for (int tile = block.first; tile < block.count; tile += block.step) {
        int row_a, row_b;
        block.at(tile, row_a, row_b);
        for (int step = 0; step < block.depth_steps; ++step) {
            const uint32_t full = block.full + 8 * stage, to = block.stages + stage * C::kStageBytes;
            barrier_wait(block.empty + 8 * stage, parity ^ 1);  // both blocks have read what was here
            barrier_expect(full, C::kStageBytes);
            load<C::kM, C::kSharesA, C::kGatedA>(to, map_a, full, step * C::kK, row_a, sizes.half, block.rank);
            load<C::kN, !C::kSharesA, C::kGatedB>(to + C::kM * kRowBytes, map_b, full, step * C::kK, row_b, sizes.half, block.rank);
            if (++stage == C::kStages) {
                stage = 0;
                parity ^= 1;
            }
        }
    }
}

template <class C>
__device__ __forceinline__ void consume(const Block<C>& block, const CUtensorMap* map_y, const Sizes& sizes, int group) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const bool leader = threadIdx.x % 128 == 0;
    const uint32_t own_chunks = block.chunks + group * C::kChunks * C::kChunkBytes;
    int stage = 0, chunk = 0;
    uint32_t parity = 0;
    const auto release = [&](int stage) { barrier_arrive(block.empty + 8 * stage, lane, lane < kCluster); };

    // The barrier 8 + group is passed once, when the group before has led for long enough.
    bool leads = sizes.lead > 0 && block.first < block.count;
    if (leads && group > 0) named_barrier_sync(8 + group, 256);
    leads = leads && group + 1 < C::kGroups;
    for (int tile = block.first; tile < block.count; tile += block.step) {
        float sums[C::kBlocks][C::kN / 2];
        int last = 0;
        for (int step = 0; step < block.depth_steps; ++step) {
            barrier_wait(block.full + 8 * stage, parity);
            const uint32_t at_a = block.stages + stage * C::kStageBytes, at_b = at_a + C::kM * kRowBytes;
            const uint64_t a = wgmma_descriptor(at_a + group * C::kGroupRows * kRowBytes), b = wgmma_descriptor(at_b);
            constexpr int kBlockRows = C::kGatedA ? C::kM / 2 : 64;  // from block to block
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < C::kBlocks; ++j)
                    Wgmma<typename C::T, C::kN>::run(sums[j], a + 2 * i + j * (kBlockRows * kRowBytes >> 4), b + 2 * i, step + i);
            }
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0) release(last);
            last = stage;
            if (++stage == C::kStages) {
                stage = 0;
                parity ^= 1;
            }
            if (leads && step == sizes.lead) {
                leads = false;
                named_barrier_arrive(8 + group + 1, 256);
            }
        }
        wgmma_wait<0>();
        release(last);

        int row_a, row_b;
        block.at(tile, row_a, row_b);
        row_a += group * C::kGroupRows;
#pragma unroll
        for (int j = 0; j < C::kGroupRows / 64; ++j) {
            const int row = row_a + j * 64 + warp * 16 + lane / 4;
            // Columns 8 i to 8 i + 7 of B's side, as Wgmma holds them.
            const auto scaled = [&](int j, int i, float(&u)[4]) {
#pragma unroll
                for (int q = 0; q < 4; ++q) u[q] = sums[j][4 * i + q];
                if constexpr (C::kScaled) {
                    const float* from_a = sizes.scales_a + (C::kGatedA ? j * sizes.half : 0);
                    const float* from_b = sizes.scales_b + 8 * i / C::kRowsB * sizes.half;
                    const float s0 = __ldg(from_a + min(row, sizes.rows_a - 1)), s1 = __ldg(from_a + min(row + 8, sizes.rows_a - 1));
                    const int column = row_b + 8 * i % C::kRowsB + lane % 4 * 2;
                    const float t0 = __ldg(from_b + min(column, sizes.rows_b - 1)), t1 = __ldg(from_b + min(column + 1, sizes.rows_b - 1));
                    u[0] *= s0 * t0;
                    u[1] *= s0 * t1;
                    u[2] *= s1 * t0;
                    u[3] *= s1 * t1;
                }
            };
            const auto values = [&](int i, float(&v)[4]) {
                scaled(j, i, v);
                if constexpr (C::kGated) {
                    float u[4];
                    if constexpr (C::kGatedA)
                        scaled(1, i, u);
                    else
                        scaled(j, i + C::kN / 16, u);
#pragma unroll
                    for (int q = 0; q < 4; ++q) v[q] = __fdividef(v[q], 1.0f + __expf(-v[q])) * u[q];
                }
            };
            constexpr int kWidth = C::kTransposed ? C::kChunkRows : 64;  // of a chunk, along B
#pragma unroll
            for (int begin = 0; begin < C::kRowsB; begin += kWidth) {
                const uint32_t buffer = own_chunks + chunk * C::kChunkBytes;
                if (leader) tma_store_wait<C::kChunks - 1>();
                named_barrier_sync(1 + group, 128);
#pragma unroll
                for (int at = 0; at < kWidth; at += 16) {
                    float v[4], w[4];
                    values((begin + at) / 8, v);
                    // 16 rows of A's side by 16 or 8 of B's; y's columns in the 128-byte swizzle.
                    const int y_row = C::kTransposed ? at + lane / 16 * 8 + lane % 8 : warp * 16 + lane / 8 % 2 * 8 + lane % 8;
                    const int vector = C::kTransposed ? warp * 2 + lane / 8 % 2 : at / 8 + lane / 16;
                    const uint32_t to = buffer + y_row * 128 + (vector ^ y_row % 8) * 16;
                    if (at + 8 < kWidth) {
                        values((begin + at) / 8 + 1, w);
                        store_matrices<C::kTransposed>(to, pack(v[0], v[1]), pack(v[2], v[3]), pack(w[0], w[1]), pack(w[2], w[3]));
                    } else {
                        store_matrices<C::kTransposed>(to, pack(v[0], v[1]), pack(v[2], v[3]));
                    }
                }
                async_proxy_fence();
                named_barrier_sync(1 + group, 128);
                if (leader) {
                    const int along_a = row_a + j * 64, along_b = row_b + begin;
                    tma_store(map_y, buffer, C::kTransposed ? along_a : along_b, C::kTransposed ? along_b : along_a);
                }
                __syncwarp();
                if (++chunk == C::kChunks) chunk = 0;
            }
        }
    }
    if (leader) tma_store_wait<0>();
    __syncwarp();
}

#endif

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
                const __grid_constant__ CUtensorMap map_y, const Sizes sizes) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ uint8_t shared[];
    const Block<C> block(shared_address(shared), sizes);
    if (threadIdx.x == 0) {
        for (int i = 0; i < C::kStages; ++i) {
            barrier_init(block.full + 8 * i, 1);
            barrier_init(block.empty + 8 * i, kCluster * C::kGroups * 4);  // the warps that read it, in both blocks
        }
        barrier_init_fence();
    }
    cluster_sync();
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // known to be the same in the warp
    if (group == C::kGroups) {
        registers_down<C::kProducerRegisters>();
        if (threadIdx.x == C::kGroups * 128) produce(block, &map_a, &map_b, sizes);
        __syncwarp();
    } else {
        registers_up<C::kConsumerRegisters>();
        consume(block, &map_y, sizes, group);
    }
    cluster_sync();  // the other block may still signal this one's barriers
#endif
}

// cuTensorMapEncodeTiled, without linking the driver's library: CPU-only machines load this library, too.
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
Encode encoder() {
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
    }();
    return encode;
}

// A contiguous matrix in boxes of 128 bytes by box_rows; what lies outside reads as zero.
template <class T>
cudaError_t make_map(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_rows) {
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t stride = sizes[0] * sizeof(T);
    const cuuint32_t box[2] = {kRowBytes / sizeof(T), static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
    const Encode encode = encoder();
    if (!encode) return cudaErrorNotSupported;
    const CUresult result =
        encode(map, sizeof(T) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes,
               &stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class C>
cudaError_t launch(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
    const int64_t y_columns = gemm.gated ? gemm.columns / 2 : gemm.columns;
    Sizes sizes{};
    sizes.rows_a = static_cast<int>(C::kTransposed ? y_columns : gemm.rows);
    sizes.rows_b = static_cast<int>(C::kTransposed ? gemm.rows : y_columns);
    sizes.depth = static_cast<int>(gemm.depth);
    sizes.half = static_cast<int>(y_columns);
    sizes.group = kGroup;
    sizes.lead = std::min(kLead, (sizes.depth - 1) / C::kK);
    sizes.scales_a = C::kTransposed ? gemm.weight_scales : gemm.x_scales;
    sizes.scales_b = C::kTransposed ? gemm.x_scales : gemm.weight_scales;

    using T = typename C::T;
    CUtensorMap a, b, y;
    cudaError_t error = make_map<T>(&a, C::kTransposed ? gemm.weight : gemm.x, C::kTransposed ? gemm.columns : gemm.rows, gemm.depth, C::kBoxA);
    if (error == cudaSuccess)
        error = make_map<T>(&b, C::kTransposed ? gemm.x : gemm.weight, C::kTransposed ? gemm.rows : gemm.columns, gemm.depth, C::kBoxB);
    if (error == cudaSuccess) error = make_map<__nv_bfloat16>(&y, gemm.y, gemm.rows, y_columns, C::kChunkRows);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(gemm_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
    if (error != cudaSuccess) return error;

    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kCluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = multiprocessors / kCluster * kCluster;
    config.blockDim = C::kThreads;
    config.dynamicSmemBytes = C::kSharedBytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    error = cudaLaunchKernelEx(&config, gemm_kernel<C>, a, b, y, sizes);
    return error != cudaSuccess ? error : cudaGetLastError();
}

// Tile 0 to kGemmTiles - 1 of factors of type T.
template <class T>
cudaError_t launch(int tile, const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
    switch (tile) {
        case 0:
            return launch<Config<T, true, false, Share::b, 2, 1, 192, 5, 64, 1>>(gemm, multiprocessors, stream);
        case 1:
            return launch<Config<T, true, false, Share::b, 3, 1, 176, 4, 88, 1>>(gemm, multiprocessors, stream);
        case 2:
            return launch<Config<T, true, false, Share::b, 3, 1, 192, 4, 64, 1>>(gemm, multiprocessors, stream);
        case 3:
            return launch<Config<T, false, false, Share::b, 2, 1, 256, 4, 64, 2>>(gemm, multiprocessors, stream);
        case 4:
            return launch<Config<T, true, false, Share::b, 2, 2, 128, 4, 64, 2>>(gemm, multiprocessors, stream);
        case 5:
            return launch<Config<T, false, true, Share::a, 2, 1, 256, 4, 64, 2>>(gemm, multiprocessors, stream);
        case 6:
            return launch<Config<T, true, true, Share::a, 2, 2, 136, 3, 136, 1>>(gemm, multiprocessors, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace

int gemm_sm90_tile(const Gemm& gemm, int multiprocessors) {
    (void)gemm;
    (void)multiprocessors;
    return -1;
}

cudaError_t gemm_sm90(const Gemm& gemm, int tile, int multiprocessors, cudaStream_t stream) {
    if (gemm.gated != (tile >= kGemmGated)) return cudaErrorInvalidValue;
    return gemm.x_scales ? launch<__nv_fp8_e4m3>(tile, gemm, multiprocessors, stream)
                         : launch<__nv_bfloat16>(tile, gemm, multiprocessors, stream);
}

}  // namespace diffusionz::kernels
