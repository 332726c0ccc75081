#include "kernels/conv2d.h"

#include <algorithm>

#include "kernels/hopper.cuh"
#include "kernels/mma.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kSide = kConv2dTile, kPixels = kSide * kSide, kChannels = 128, kDepth = 64;  // a tile, and a step along the inputs
constexpr int kWarpgroups = 2, kThreads = 128 * (1 + kWarpgroups);
constexpr int kPixelStages = 2, kWeightStages = 5;
constexpr int kWeightBytes = kChannels * kDepth * 2;
constexpr int kOutBytes = kPixels * 64 * 2;  // of a warpgroup

struct Shape {
    int rows, columns, tile_rows, tile_columns, channel_tiles, tiles, depth_steps, out, first_row, first_column;
    int64_t moments_stride;
};

template <int kTaps>
constexpr int kPixelBytes = kSide * (kSide + kTaps - 1) * kDepth * 2;
template <int kTaps>
constexpr int kSharedBytes =
    1024 + kPixelStages * kPixelBytes<kTaps> + kWeightStages * kWeightBytes + kWarpgroups * kOutBytes + 256;

__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int channel, int column, int row,
                                         int image) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(to),
        "l"(map), "r"(barrier), "r"(channel), "r"(column), "r"(row), "r"(image)
        : "memory");
}
__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int channel, int tap, int out) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];\n" ::"r"(to),
        "l"(map), "r"(barrier), "r"(channel), "r"(tap), "r"(out)
        : "memory");
}
__device__ __forceinline__ void store_box(const CUtensorMap* map, uint32_t from, int channel, int column, int row, int image) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(map), "r"(from),
                 "r"(channel), "r"(column), "r"(row), "r"(image)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

// A place in a ring of kStages buffers and the parity of its current round.
template <int kStages>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct Tile {
    int image, row, column, channel, index;
    __device__ Tile(const Shape& s, int tile) {
        channel = tile % s.channel_tiles * kChannels;
        const int place = tile / s.channel_tiles, in_image = s.tile_rows * s.tile_columns;
        image = place / in_image;
        index = place % in_image;
        row = index / s.tile_columns * kSide;
        column = index % s.tile_columns * kSide;
    }
};

template <int kTaps>
__global__ void __launch_bounds__(kThreads, 1)
    conv2d_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                  const __grid_constant__ CUtensorMap y_map, const __grid_constant__ CUtensorMap residual_map, const bf16* bias,
                  float* moments, int has_residual, const Shape s) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ unsigned char raw[];
    const uint32_t base = (shared_address(raw) + 1023) / 1024 * 1024;
    const uint32_t pixels = base, weights = pixels + kPixelStages * kPixelBytes<kTaps>,
                   outs = weights + kWeightStages * kWeightBytes, barriers = outs + kWarpgroups * kOutBytes;
    const auto pixels_full = [=](int i) { return barriers + 8 * i; };
    const auto pixels_empty = [=](int i) { return barriers + 8 * (kPixelStages + i); };
    const auto weights_full = [=](int i) { return barriers + 8 * (2 * kPixelStages + i); };
    const auto weights_empty = [=](int i) { return barriers + 8 * (2 * kPixelStages + kWeightStages + i); };
    const auto out_ready = [=](int i) { return barriers + 8 * (2 * kPixelStages + 2 * kWeightStages + i); };
    const auto out_written = [=](int i) { return barriers + 8 * (2 * kPixelStages + 2 * kWeightStages + kWarpgroups + i); };
    const int warpgroup = threadIdx.x / 128;

    if (threadIdx.x == 0) {
        for (int i = 0; i < kPixelStages; ++i) barrier_init(pixels_full(i), 1), barrier_init(pixels_empty(i), kWarpgroups);
        for (int i = 0; i < kWeightStages; ++i) barrier_init(weights_full(i), 1), barrier_init(weights_empty(i), kWarpgroups);
        for (int i = 0; i < kWarpgroups; ++i) barrier_init(out_ready(i), 1), barrier_init(out_written(i), 128);
        barrier_init_fence();
    }
    __syncthreads();

    if (warpgroup == 0) {
        registers_down<40>();
        const int warp = threadIdx.x / 32;
        if (threadIdx.x % 32 != 0) return;
        if (warp == 0) {
            Ring<kPixelStages> p;
            for (int t = blockIdx.x; t < s.tiles; t += gridDim.x) {
                const Tile tile(s, t);
                for (int k = 0; k < s.depth_steps; ++k) {
                    for (int dx = 0; dx < kTaps; ++dx, p.next()) {
                        barrier_wait(pixels_empty(p.stage), p.parity ^ 1);
                        barrier_expect(pixels_full(p.stage), kPixelBytes<kTaps>);
                        load_box(pixels + p.stage * kPixelBytes<kTaps>, &x_map, pixels_full(p.stage), k * kDepth,
                                 tile.column + s.first_column + dx, tile.row + s.first_row, tile.image);
                    }
                }
            }
        } else if (warp == 1) {
            Ring<kWeightStages> w;
            for (int t = blockIdx.x; t < s.tiles; t += gridDim.x) {
                const Tile tile(s, t);
                for (int k = 0; k < s.depth_steps; ++k) {
                    for (int tap = 0; tap < kTaps * kTaps; ++tap, w.next()) {
                        barrier_wait(weights_empty(w.stage), w.parity ^ 1);
                        barrier_expect(weights_full(w.stage), kWeightBytes);
                        load_box(weights + w.stage * kWeightBytes, &weight_map, weights_full(w.stage), k * kDepth,
                                 tap % kTaps * kTaps + tap / kTaps, tile.channel);
                    }
                }
            }
        } else {
            // Warps 2 and 3 move a warpgroup's results out and its residual in.
            const int mine = warp - 2;
            uint32_t parity = 0;
            for (int t = blockIdx.x; t < s.tiles; t += gridDim.x, parity ^= 1) {
                const Tile tile(s, t);
                const int channel = tile.channel + 64 * mine;
                if (has_residual) {
                    barrier_expect(out_ready(mine), kOutBytes);
                    load_box(outs + mine * kOutBytes, &residual_map, out_ready(mine), channel, tile.column, tile.row, tile.image);
                } else {
                    barrier_arrive(out_ready(mine), 0, true);
                }
                barrier_wait(out_written(mine), parity);
                store_box(&y_map, outs + mine * kOutBytes, channel, tile.column, tile.row, tile.image);
                tma_store_wait<0>();
            }
            asm volatile("cp.async.bulk.wait_group 0;\n" ::: "memory");
        }
    } else {
        registers_up<232>();
        const int mine = warpgroup - 1, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const bool first = threadIdx.x % 128 == 0;
        Ring<kPixelStages> p;
        Ring<kWeightStages> w;
        uint32_t out_parity = 0;
        float d[kPixels / 2];
        for (int t = blockIdx.x; t < s.tiles; t += gridDim.x, out_parity ^= 1) {
            int weight_before = -1, pixel_before = -1;  // what the products that are still under way read
            for (int step = 0; step < s.depth_steps * kTaps; ++step, p.next()) {
                barrier_wait(pixels_full(p.stage), p.parity);
#pragma unroll
                for (int dy = 0; dy < kTaps; ++dy, w.next()) {
                    barrier_wait(weights_full(w.stage), w.parity);
                    const uint64_t a = wgmma_descriptor(weights + w.stage * kWeightBytes + mine * 64 * kDepth * 2);
                    const uint64_t b = wgmma_descriptor(pixels + p.stage * kPixelBytes<kTaps> + dy * kSide * kDepth * 2);
                    wgmma_fence();
#pragma unroll
                    for (int i = 0; i < kDepth / 16; ++i)
                        Wgmma<bf16, kPixels>::run(d, a + 2 * i, b + 2 * i, step > 0 || dy > 0 || i > 0);
                    wgmma_commit();
                    wgmma_wait<1>();
                    if (weight_before >= 0) barrier_arrive(weights_empty(weight_before), 0, first);
                    if (dy == 0 && pixel_before >= 0) barrier_arrive(pixels_empty(pixel_before), 0, first);
                    weight_before = w.stage;
                }
                pixel_before = p.stage;
            }
            wgmma_wait<0>();
            barrier_arrive(weights_empty(weight_before), 0, first);
            barrier_arrive(pixels_empty(pixel_before), 0, first);

            const Tile tile(s, t);
            const int channel = tile.channel + 64 * mine + 16 * warp + lane / 4;
            const float bias0 = bias && channel < s.out ? to_float(bias[channel]) : 0.0f;
            const float bias1 = bias && channel + 8 < s.out ? to_float(bias[channel + 8]) : 0.0f;
#pragma unroll
            for (int j = 0; j < kPixels / 8; ++j) {
                d[4 * j] += bias0, d[4 * j + 1] += bias0;
                d[4 * j + 2] += bias1, d[4 * j + 3] += bias1;
            }
            // Row l % 8 of matrix l / 8: pixel 8 (j + l / 16) + l % 8, channels 16 warp + 8 (l / 8 % 2) ....
            const uint32_t place = outs + mine * kOutBytes + (lane / 16 * 8 + lane % 8) * 128 +
                                   (((2 * warp + lane / 8 % 2) ^ (lane % 8)) << 4);
            barrier_wait(out_ready(mine), out_parity);
            if (has_residual) {
#pragma unroll
                for (int j = 0; j < kPixels / 8; j += 2) {
                    uint32_t r[4];
                    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                                 : "r"(place + j * 8 * 128)
                                 : "memory");
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        d[4 * j + 2 * i] += __uint_as_float(r[i] << 16);
                        d[4 * j + 2 * i + 1] += __uint_as_float(r[i] & 0xffff0000u);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < kPixels / 8; j += 2) {
                store_matrices<true>(place + j * 8 * 128, pack<bf16>(d[4 * j], d[4 * j + 1]), pack<bf16>(d[4 * j + 2], d[4 * j + 3]),
                                     pack<bf16>(d[4 * j + 4], d[4 * j + 5]), pack<bf16>(d[4 * j + 6], d[4 * j + 7]));
            }
            async_proxy_fence();
            barrier_arrive(out_written(mine), 0, true);

            if (!moments) continue;
            const int valid_rows = min(kSide, s.rows - tile.row), valid_columns = min(kSide, s.columns - tile.column);
            const float inverse = 1.0f / static_cast<float>(valid_rows * valid_columns);
            if (valid_rows * valid_columns != kPixels) {
#pragma unroll
                for (int j = 0; j < kPixels / 8; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const bool valid = j / 2 < valid_rows && j % 2 * 8 + lane % 4 * 2 + i % 2 < valid_columns;
                        d[4 * j + i] = valid ? d[4 * j + i] : __int_as_float(0x7fc00000);
                    }
                }
            }
            float mean[2], squares[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float sum = 0.0f;
#pragma unroll
                for (int j = 0; j < kPixels / 8; ++j) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float value = d[4 * j + 2 * h + i];
                        sum += value == value ? value : 0.0f;
                    }
                }
                sum += __shfl_xor_sync(~0u, sum, 1);
                sum += __shfl_xor_sync(~0u, sum, 2);
                mean[h] = sum * inverse;
                float square = 0.0f;
#pragma unroll
                for (int j = 0; j < kPixels / 8; ++j) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float distance = d[4 * j + 2 * h + i] - mean[h];
                        square += distance == distance ? distance * distance : 0.0f;
                    }
                }
                square += __shfl_xor_sync(~0u, square, 1);
                square += __shfl_xor_sync(~0u, square, 2);
                squares[h] = square;
            }
            if (lane % 4 < 2 && channel + lane % 4 * 8 < s.out) {
                const int h = lane % 4;
                float2* to = reinterpret_cast<float2*>(moments + tile.image * s.moments_stride) +
                             static_cast<int64_t>(tile.index) * s.out + channel + 8 * h;
                *to = h ? make_float2(mean[1], squares[1]) : make_float2(mean[0], squares[0]);
            }
        }
    }
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
    static const Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found{};
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) != cudaSuccess ||
            found != cudaDriverEntryPointSuccess)
            function = nullptr;
        return reinterpret_cast<Encode>(function);
    }();
    return encode;
}

bool describe(CUtensorMap* map, const void* data, int rank, std::initializer_list<int64_t> sizes,
              std::initializer_list<int64_t> strides, std::initializer_list<int> box) {
    cuuint64_t size[4], stride[4];
    cuuint32_t tile[4], step[4] = {1, 1, 1, 1};
    std::copy(sizes.begin(), sizes.end(), size);
    std::transform(strides.begin(), strides.end(), stride, [](int64_t numbers) { return static_cast<cuuint64_t>(numbers) * 2; });
    std::copy(box.begin(), box.end(), tile);
    const Encode encode = encoder();
    return encode && encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, static_cast<cuuint32_t>(rank), const_cast<void*>(data), size, stride,
                            tile, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int kTaps>
cudaError_t run(const Conv2dCall& call, cudaStream_t stream) {
    CUtensorMap x, weight, y, residual;
    const int64_t image = call.height * call.width * call.in;
    bool ok = describe(&x, call.x, 4, {call.in, call.width, call.height, call.batch}, {call.in, call.width * call.in, image},
                       {kDepth, kSide, kSide + kTaps - 1, 1});
    ok = ok && describe(&weight, call.weight, 3, {call.in, kTaps * kTaps, call.out}, {call.in, kTaps * kTaps * call.in},
                        {kDepth, 1, kChannels});
    const auto result = [&](CUtensorMap* map, const void* data) {
        return describe(map, data, 4, {call.out, call.width, call.height, call.batch},
                        {call.pixel_stride, call.row_stride, call.image_stride}, {64, kSide, kSide, 1});
    };
    ok = ok && result(&y, call.y) && result(&residual, call.residual ? call.residual : call.y);
    if (!ok) return cudaErrorNotSupported;

    Shape s{};
    s.rows = static_cast<int>(call.height);
    s.columns = static_cast<int>(call.width);
    s.tile_rows = (s.rows + kSide - 1) / kSide;
    s.tile_columns = (s.columns + kSide - 1) / kSide;
    s.channel_tiles = static_cast<int>((call.out + kChannels - 1) / kChannels);
    s.tiles = static_cast<int>(call.batch) * s.tile_rows * s.tile_columns * s.channel_tiles;
    s.depth_steps = static_cast<int>((call.in + kDepth - 1) / kDepth);
    s.out = static_cast<int>(call.out);
    s.first_row = static_cast<int>(call.first_row);
    s.first_column = static_cast<int>(call.first_column);
    s.moments_stride = call.moments_stride;
    int device = 0, processors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(conv2d_kernel<kTaps>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<kTaps>);
    if (error != cudaSuccess) return error;
    conv2d_kernel<kTaps><<<std::min(processors, s.tiles), kThreads, kSharedBytes<kTaps>, stream>>>(
        x, weight, y, residual, static_cast<const bf16*>(call.bias), call.moments, call.residual != nullptr, s);
    return cudaGetLastError();
}

}  // namespace

bool conv2d_sm90_takes(int device, int64_t in, int64_t out, int64_t taps) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
        return false;
    // Rows of the tensor maps are multiples of 16 bytes.
    return major == 9 && minor == 0 && in % 8 == 0 && out % 8 == 0 && taps >= 1 && taps <= 3 && encoder();
}

cudaError_t conv2d_sm90(const Conv2dCall& call, cudaStream_t stream) {
    switch (call.taps) {
        case 1:
            return run<1>(call, stream);
        case 2:
            return run<2>(call, stream);
        case 3:
            return run<3>(call, stream);
        default:
            return cudaErrorNotSupported;
    }
}

}  // namespace diffusionz::kernels
