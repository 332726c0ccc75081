// y = x W^T (bfloat16, or float8_e4m3fn with a scale a row of each factor), and y = silu(x W1^T) * (x W3^T), on Hopper.
//
// A persistent block on each multiprocessor takes tile after tile of y. One thread loads (tensor memory accelerator, 128-byte
// swizzle, a ring of stages in shared memory); two or three warpgroups multiply (wgmma, both factors from shared memory, sums in
// registers) and store (stmatrix, then the accelerator, which clips at y's edges). Two blocks, a cluster, work on tiles side by
// side; of the factor that they share each loads one half, for both.
//
// W's rows feed wgmma's operand of 64 rows and x's the other one, whose height may be any multiple of 8: W's sizes are multiples of
// every tile, and a number of tokens that is none is cut into tiles that fill whole waves of multiprocessors. Tiles are numbered
// along the tokens first, so that W streams through once and x stays in the second-level cache.
//
// Gated, a tile takes 8 rows of W1 and 8 of W3 in turn (one load: W as [half / 8, 2, 8, depth]), so that one thread holds both
// sides of the gate.
//
// Numbers: products exact, sums in the tensor cores' float32 (FP8: the cores' shorter sums, as cuBLAS's fast accumulation), scales
// and gate in float32, one rounding to bfloat16. The tile follows from the sizes alone; no tile splits the depth, and all give the
// same bytes.
// Limits: in gemm_sm90.h. Reference: at::linear, at::_scaled_mm and silu_gate in ops/linear.cc and ops/gated_linear.cc.

#include "kernels/gemm_sm90.h"

#include <algorithm>

#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "kernels/tensor_map.h"

namespace diffusionz::kernels {
namespace {

constexpr int kRowBytes = 128;  // of a stage's rows: the width of the swizzle
constexpr int kCluster = 2;
constexpr int kGroup = 24;  // clusters' tiles along the tokens before W goes on

// A tile of kW rows of W by kTokens rows of x. kSharesW: a cluster's tiles lie side by side along the tokens. y is stored in chunks
// of kChunkTokens tokens, for which a warpgroup has one buffer.
template <class T_, bool kGated_, bool kSharesW_, int kW_, int kTokens_, int kStages_, int kChunkTokens_>
struct Config {
    using T = T_;
    static constexpr bool kGated = kGated_, kScaled = sizeof(T) == 1, kSharesW = kSharesW_;
    static constexpr int kW = kW_, kTokens = kTokens_, kDepth = kRowBytes / sizeof(T), kGroups = kW / 64;
    static constexpr int kStages = kStages_, kStageBytes = (kW + kTokens) * kRowBytes;
    // A warpgroup's 64 columns of y in the 128-byte swizzle, or its 32 gated ones in the 64-byte one.
    static constexpr int kColumns = kGated ? 32 : 64;
    static constexpr int kChunkTokens = kGated && kTokens % (2 * kChunkTokens_) == 0 ? 2 * kChunkTokens_ : kChunkTokens_;
    static constexpr int kChunkBytes = kChunkTokens * kColumns * 2;
    static constexpr int kSharedBytes = 1024 + kStages * kStageBytes + kGroups * kChunkBytes + kStages * 16;
    static constexpr int kThreads = (kGroups + 1) * 128;
    // The register file, shared out: 64 K registers over the threads at launch, then most of them to who multiplies.
    static constexpr int kProducerRegisters = kGroups == 2 ? 40 : 32, kConsumerRegisters = kGroups == 2 ? 232 : 160;
    static constexpr int kBoxW = kSharesW ? kW / 2 : kW, kBoxX = kSharesW ? kTokens : kTokens / 2;  // what one load brings
    static constexpr int kTilesW = kSharesW ? 1 : kCluster, kTilesX = kSharesW ? kCluster : 1;      // of a cluster

    static_assert(kSharedBytes <= 232448 && kStageBytes % 1024 == 0 && kChunkBytes % 1024 == 0);
    static_assert(kBoxW % 16 == 0 && kBoxX % 8 == 0 && kTokens % kChunkTokens == 0 && kChunkTokens % (kGated ? 16 : 8) == 0);
};

struct Sizes {
    int rows, columns, depth;  // of x, of W (both halves when gated), of both
    const float* x_scales;
    const float* weight_scales;
};

__device__ __forceinline__ uint32_t pack(float a, float b) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ float gate(float a, float b) { return __fdividef(a, 1.0f + __expf(-a)) * b; }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What all roles know: where things lie in shared memory, and which tiles are this cluster's.
template <class C>
struct Block {
    uint32_t stages, chunks, full, empty, rank;
    int tiles_w, tiles_x, group, count, first, step, depth_steps;

    __device__ __forceinline__ Block(uint32_t shared, const Sizes& sizes) {
        stages = (shared + 1023) & ~1023u;
        chunks = stages + C::kStages * C::kStageBytes;
        full = chunks + C::kGroups * C::kChunkBytes;
        empty = full + C::kStages * 8;
        rank = cluster_rank();
        tiles_w = (sizes.columns + C::kW * C::kTilesW - 1) / (C::kW * C::kTilesW);
        tiles_x = (sizes.rows + C::kTokens * C::kTilesX - 1) / (C::kTokens * C::kTilesX);
        group = min(kGroup, tiles_x);
        count = tiles_w * tiles_x;
        first = blockIdx.x / kCluster;
        step = gridDim.x / kCluster;
        depth_steps = (sizes.depth + C::kDepth - 1) / C::kDepth;
    }
    // The first rows of W and x of this block's part of the cluster's tile `index`.
    __device__ __forceinline__ void at(int index, int& row_w, int& row_x) const {
        const int of_group = group * tiles_w, g = index / of_group, rest = index - g * of_group;
        const int width = min(group, tiles_x - g * group), w = rest / width, x = g * group + rest - w * width;
        row_w = (w * C::kTilesW + (C::kSharesW ? 0 : rank)) * C::kW;
        row_x = (x * C::kTilesX + (C::kSharesW ? rank : 0)) * C::kTokens;
    }
};

template <class C>
__device__ __forceinline__ void produce(const Block<C>& block, const CUtensorMap* map_w, const CUtensorMap* map_x) {
    int stage = 0;
    uint32_t parity = 0;
    for (int tile = block.first; tile < block.count; tile += block.step) {
        int row_w, row_x;
        block.at(tile, row_w, row_x);
        for (int step = 0; step < block.depth_steps; ++step) {
            const uint32_t full = block.full + 8 * stage, to_w = block.stages + stage * C::kStageBytes;
            const uint32_t to_x = to_w + C::kW * kRowBytes;
            const uint32_t half_w = C::kSharesW ? block.rank * C::kBoxW : 0, half_x = C::kSharesW ? 0 : block.rank * C::kBoxX;
            barrier_wait(block.empty + 8 * stage, parity ^ 1);  // both blocks have read what was here
            barrier_expect(full, C::kStageBytes);
            if constexpr (C::kGated)
                tma_load_interleaved<C::kSharesW>(to_w + half_w * kRowBytes, map_w, full, step * C::kDepth, (row_w + half_w) / 16);
            else
                tma_load<C::kSharesW>(to_w + half_w * kRowBytes, map_w, full, step * C::kDepth, row_w + half_w);
            tma_load<!C::kSharesW>(to_x + half_x * kRowBytes, map_x, full, step * C::kDepth, row_x + half_x);
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
    const uint32_t chunk = block.chunks + group * C::kChunkBytes;
    int stage = 0;
    uint32_t parity = 0;
    const auto release = [&](int stage) { barrier_arrive(block.empty + 8 * stage, lane, lane < kCluster); };

    for (int tile = block.first; tile < block.count; tile += block.step) {
        float sums[C::kTokens / 2];
        int last = 0;
        for (int step = 0; step < block.depth_steps; ++step) {
            barrier_wait(block.full + 8 * stage, parity);
            const uint32_t at_w = block.stages + stage * C::kStageBytes;
            const uint64_t w = wgmma_descriptor(at_w + group * 64 * kRowBytes), x = wgmma_descriptor(at_w + C::kW * kRowBytes);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < 4; ++i) Wgmma<typename C::T, C::kTokens>::run(sums, w + 2 * i, x + 2 * i, step + i);
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0) release(last);
            last = stage;
            if (++stage == C::kStages) {
                stage = 0;
                parity ^= 1;
            }
        }
        wgmma_wait<0>();
        release(last);

        int row_w, row_x;
        block.at(tile, row_w, row_x);
        // This thread's numbers come from row 16 warp + lane / 4 of its group's 64, and from 8 below: gated, W1's and W3's row of
        // one column of y.
        const int column = (C::kGated ? row_w / 2 : row_w) + group * C::kColumns;
        float scales[2] = {};
        if constexpr (C::kScaled) {
            const int columns = C::kGated ? sizes.columns / 2 : sizes.columns, own = column + warp * (C::kColumns / 4) + lane / 4;
            scales[0] = __ldg(sizes.weight_scales + min(own, columns - 1));
            scales[1] = __ldg(sizes.weight_scales + (C::kGated ? columns + min(own, columns - 1) : min(own + 8, columns - 1)));
        }
        // Tokens 8 i to 8 i + 7, as Wgmma holds them.
        const auto scaled = [&](int i, float(&v)[4]) {
#pragma unroll
            for (int q = 0; q < 4; ++q) v[q] = sums[4 * i + q];
            if constexpr (C::kScaled) {
                const int token = row_x + 8 * i + lane % 4 * 2;
                const float first = __ldg(sizes.x_scales + min(token, sizes.rows - 1));
                const float second = __ldg(sizes.x_scales + min(token + 1, sizes.rows - 1));
                v[0] *= scales[0] * first;
                v[1] *= scales[0] * second;
                v[2] *= scales[1] * first;
                v[3] *= scales[1] * second;
            }
        };
#pragma unroll
        for (int begin = 0; begin < C::kTokens; begin += C::kChunkTokens) {
            if (leader) tma_store_wait<0>();
            named_barrier_sync(1 + group, 128);
#pragma unroll
            for (int at = 0; at < C::kChunkTokens; at += 16) {
                // 16 tokens by 8 columns of y a warp, gated, else by 16; the last may be 8 by 16.
                float v[4], w[4];
                scaled((begin + at) / 8, v);
                const int token = at + (C::kGated ? lane % 16 : lane / 16 * 8 + lane % 8);
                const int vector = C::kGated ? warp ^ token / 2 % 4 : (warp * 2 + lane / 8 % 2) ^ token % 8;
                const uint32_t to = chunk + token * C::kColumns * 2 + vector * 16;
                if (C::kGated || at + 8 < C::kChunkTokens) scaled((begin + at) / 8 + 1, w);
                if constexpr (C::kGated)
                    store_matrices_transposed(to, pack(gate(v[0], v[2]), gate(v[1], v[3])),
                                              pack(gate(w[0], w[2]), gate(w[1], w[3])));
                else if (at + 8 < C::kChunkTokens)
                    store_matrices_transposed(to, pack(v[0], v[1]), pack(v[2], v[3]), pack(w[0], w[1]), pack(w[2], w[3]));
                else
                    store_matrices_transposed(to, pack(v[0], v[1]), pack(v[2], v[3]));
            }
            async_proxy_fence();
            named_barrier_sync(1 + group, 128);
            if (leader) tma_store(map_y, chunk, column, row_x + begin);
            __syncwarp();
        }
    }
    if (leader) tma_store_wait<0>();
    __syncwarp();
}

#endif

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap map_w, const __grid_constant__ CUtensorMap map_x,
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
    wait_for_the_kernel_before();
    start_the_kernel_after();
    const int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // a warp's, as the compiler can then tell
    if (group == C::kGroups) {
        registers_down<C::kProducerRegisters>();
        if (threadIdx.x == C::kGroups * 128) produce(block, &map_w, &map_x);
        __syncwarp();
    } else {
        registers_up<C::kConsumerRegisters>();
        consume(block, &map_y, sizes, group);
    }
    cluster_sync();  // the other block may still signal this one's barriers
#endif
}

// A contiguous matrix in boxes of box_bytes by box_rows; what lies outside reads as zero. Interleaved: of the rows of its halves, 8
// of each in turn.
template <class T>
cudaError_t make_map(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_bytes, int box_rows,
                     bool interleaved) {
    const cuuint64_t length = columns, stride = length * sizeof(T), half = rows / 2;
    const cuuint32_t width = box_bytes / sizeof(T), steps[4] = {1, 1, 1, 1};
    const cuuint64_t plain_sizes[2] = {length, static_cast<cuuint64_t>(rows)}, plain_strides[1] = {stride};
    const cuuint32_t plain_box[2] = {width, static_cast<cuuint32_t>(box_rows)};
    const cuuint64_t sizes[4] = {length, 8, 2, half / 8}, strides[3] = {stride, half * stride, 8 * stride};
    const cuuint32_t box[4] = {width, 8, 2, static_cast<cuuint32_t>(box_rows / 16)};
    const EncodeTensorMap encode = tensor_map_encoder();
    if (!encode) return cudaErrorNotSupported;
    const CUresult result =
        encode(map, sizeof(T) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, interleaved ? 4 : 2,
               const_cast<void*>(data), interleaved ? sizes : plain_sizes, interleaved ? strides : plain_strides,
               interleaved ? box : plain_box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <class C>
cudaError_t launch(const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
    using T = typename C::T;
    const Sizes sizes{static_cast<int>(gemm.rows), static_cast<int>(gemm.columns), static_cast<int>(gemm.depth), gemm.x_scales,
                      gemm.weight_scales};
    CUtensorMap w, x, y;
    cudaError_t error = make_map<T>(&w, gemm.weight, gemm.columns, gemm.depth, kRowBytes, C::kBoxW, C::kGated);
    if (error == cudaSuccess) error = make_map<T>(&x, gemm.x, gemm.rows, gemm.depth, kRowBytes, C::kBoxX, false);
    if (error == cudaSuccess)
        error = make_map<__nv_bfloat16>(&y, gemm.y, gemm.rows, C::kGated ? gemm.columns / 2 : gemm.columns, C::kColumns * 2,
                                        C::kChunkTokens, false);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(gemm_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
    if (error != cudaSuccess) return error;
    return launch_clusters(kCluster, gemm_kernel<C>, multiprocessors / kCluster * kCluster, C::kThreads, C::kSharedBytes, stream, w, x, y,
                           sizes);
}

struct Tile {
    int w, tokens;
    bool shares_w;
    int stages, chunk_tokens;
};
constexpr Tile kTiles[kGemmTiles] = {
    {192, 176, true, 4, 88}, {192, 192, true, 4, 64}, {128, 192, true, 5, 64}, {128, 160, false, 5, 80}};

template <class T, bool kGated, int kTile = 0>
cudaError_t launch(int tile, const Gemm& gemm, int multiprocessors, cudaStream_t stream) {
    if constexpr (kTile == kGemmTiles) {
        return cudaErrorInvalidValue;
    } else {
        if (tile != kTile) return launch<T, kGated, kTile + 1>(tile, gemm, multiprocessors, stream);
        constexpr Tile kCut = kTiles[kTile];
        return launch<Config<T, kGated, kCut.shares_w, kCut.w, kCut.tokens, kCut.stages, kCut.chunk_tokens>>(gemm, multiprocessors,
                                                                                                              stream);
    }
}

}  // namespace

int gemm_sm90_tile(const Gemm& gemm, int multiprocessors) {
    const bool fp8 = gemm.x_scales;
    if (gemm.rows > INT32_MAX || gemm.columns > INT32_MAX || gemm.depth % (fp8 ? 16 : 8) != 0) return -1;
    if (gemm.columns % (gemm.gated ? 16 : 8) != 0) return -1;
    const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
    int best = 0;
    double least = 0;  // the work of a multiprocessor, in numbers of y at the speed of the fastest tile
    for (int i = 0; i < kGemmTiles; ++i) {
        const Tile& tile = kTiles[i];
        const int64_t clusters = parts(gemm.columns, tile.w * (tile.shares_w ? 1 : kCluster)) *
                                 parts(gemm.rows, tile.tokens * (tile.shares_w ? kCluster : 1));
        const double speed = tile.w == 192 ? 1.0 : 0.95;  // measured
        const double work = static_cast<double>(parts(clusters, multiprocessors / kCluster) * tile.w * tile.tokens) / speed;
        if (i == 0 || work < least) {
            best = i;
            least = work;
        }
    }
    const double used = static_cast<double>(gemm.rows) * gemm.columns / multiprocessors / least;
    // Where this kernel won on an H100 against cuBLAS, in turns under load (rows x columns, depth):
    //   1056 x 11520, 3840 x 3840, 20480, 3840 of depth 10240   bfloat16 -4, -7, -11, -8%   FP8 -8, -33, -11, -38%
    //   1088, the same                                                   -3,  0,  -2, -1%       -1, -30,  -5, -36%
    //   4128, the same                                                   -1, +7,  +1, -2%       +6,  +1,  +5,  -4%
    //   2336, the same                                                   +5, +10, -4, +12%     +10,  +2,  +7,  +3%
    // and gated, where the library needs a pass of its own over y, always. At 4160 rows, in a whole step under the chip's power limit,
    // the last of them takes 2.6 ms more of a step's 90 here than by the library in bfloat16, and as long in FP8: plain products of
    // many rows are the library's. Below 512 rows a product is a matter of reading the weight.
    if (gemm.rows < 512 || gemm.depth < 1024 || gemm.columns < 1024) return -1;
    if (gemm.rows <= 1536) return used > (fp8 ? 0.75 : 0.85) ? best : -1;
    return gemm.gated && used > 0.85 ? best : -1;
}

cudaError_t gemm_sm90(const Gemm& gemm, int tile, int multiprocessors, cudaStream_t stream) {
    if (gemm.x_scales)
        return gemm.gated ? launch<__nv_fp8_e4m3, true>(tile, gemm, multiprocessors, stream)
                          : launch<__nv_fp8_e4m3, false>(tile, gemm, multiprocessors, stream);
    return gemm.gated ? launch<__nv_bfloat16, true>(tile, gemm, multiprocessors, stream)
                      : launch<__nv_bfloat16, false>(tile, gemm, multiprocessors, stream);
}

}  // namespace diffusionz::kernels
