// y = bias + conv(x, weight) [+ residual] [+ shortcut_bias + shortcut_weight shortcut_x], channels-last, stride 1, on Hopper; and what the
// normalisation behind it must know of y.
//
// An implicit matrix product: a tile of y is 128 channels x 16x16 pixels, its depth the taps times the inputs, 64 at once. The pixels
// are wgmma's B operand (256 columns), so a warp holds 16 channels of all the tile's pixels, and sums over pixels are sums over its
// registers. A persistent block on each multiprocessor takes tile after tile. Four warps move data, a task each, so that none waits
// for another's buffer: boxes of pixels, boxes of weights, and the results (and residuals) of each of the two warpgroups that
// multiply. A box of pixels (tensor memory accelerator, 128-byte swizzle, zeros outside the picture) has the tile's columns shifted
// by one tap and its rows with their border: a tap further down begins 16 pixels, a multiple of the swizzle, later in shared memory.
// So a tile is read 3.4 times for nine taps. A residual waits in the buffer that the results leave through; a shortcut is more depth.
// The warpgroups run apart as far as the buffers allow, so one's end of a tile overlaps the other's products.
//
// Numbers: products exact, sums in the tensor cores' float32, bias and residual in float32, one rounding. Moments are of the unrounded
// numbers, squares around the tile's own mean. No tile splits the depth, nothing depends on which block is first.
// Limits: bfloat16, kernels of 2x2 and 3x3, channels in multiples of 8, a picture of fewer than 2^31 tiles.
// On an H100 at a decoder's sizes 770 to 840 TFLOP/s; cuDNN 680 to 810, with its bias in a pass of its own 360 to 650.
// Reference: at::conv2d in ops/conv2d.cc.

#include "kernels/conv2d.h"

#include <algorithm>

#include "kernels/hopper.cuh"
#include "kernels/launch.cuh"
#include "kernels/mma.cuh"
#include "kernels/tensor_map.h"
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
    int rows, columns, tile_rows, tile_columns, channel_tiles, tiles, depth_steps, shortcut_steps, out, first_row, first_column;
    int64_t moments_stride;
};

template <int kTaps>
constexpr int kPixelBytes = kSide * (kSide + kTaps - 1) * kDepth * 2;
template <int kTaps>
constexpr int kSharedBytes =
    1024 + kPixelStages * kPixelBytes<kTaps> + kWeightStages * kWeightBytes + kWarpgroups * kOutBytes + 256;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void load_box(uint32_t to, const CUtensorMap* map, uint32_t barrier, int channel, int column, int row,
                                         int image) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(to),
        "l"(map), "r"(barrier), "r"(channel), "r"(column), "r"(row), "r"(image)
        : "memory");
}
__device__ __forceinline__ void store_box(const CUtensorMap* map, uint32_t from, int channel, int column, int row, int image) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n" ::"l"(map), "r"(from),
                 "r"(channel), "r"(column), "r"(row), "r"(image)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

// d [64, 256] = (accumulate ? d : 0) + A [64, 16] B [256, 16]^T by the four warps of a warpgroup. A thread holds, of each 8 columns i,
// d[4 i + 0, 1] in row 16 warp + lane / 4, columns 8 i + 2 (lane % 4) + {0, 1}, and d[4 i + 2, 3] eight rows below.
#define OPERANDS_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define OPERANDS_32(i) OPERANDS_8(i), OPERANDS_8(i + 8), OPERANDS_8(i + 16), OPERANDS_8(i + 24)
__device__ __forceinline__ void wgmma(float (&d)[kPixels / 2], uint64_t a_tile, uint64_t b_tile, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, p, 1, 1, 0, 0;\n}\n"
        : OPERANDS_32(0), OPERANDS_32(32), OPERANDS_32(64), OPERANDS_32(96)
        : "l"(a_tile), "l"(b_tile), "r"(accumulate));
}
#undef OPERANDS_32
#undef OPERANDS_8

// Four 8x8 matrices from a warp's registers, transposed, to shared memory, and back; lane l gives the address of row l % 8 of
// matrix l / 8.
__device__ __forceinline__ void put_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
__device__ __forceinline__ void get_matrices(uint32_t (&out)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(from)
                 : "memory");
}

#endif

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

// Of a thread's two channels, over the `count` pixels of the tile for which inside(group of eight, 0 or 1) holds, which four
// neighbouring threads have: each channel's mean and its summed squared distances from it.
template <class Inside>
__device__ __forceinline__ void moments_of(const float (&d)[kPixels / 2], Inside&& inside, int count, float (&mean)[2], float (&squares)[2]) {
    const auto sum_of = [&](auto&& number) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kPixels / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) sum += inside(j, i) ? number(4 * j + i) : 0.0f;
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        return sum + __shfl_xor_sync(~0u, sum, 2);
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        mean[h] = sum_of([&](int i) { return d[i + 2 * h]; }) / static_cast<float>(count);
        squares[h] = sum_of([&](int i) { return (d[i + 2 * h] - mean[h]) * (d[i + 2 * h] - mean[h]); });
    }
}

template <int kTaps>
__global__ void __launch_bounds__(kThreads, 1)
    conv2d_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                  const __grid_constant__ CUtensorMap y_map, const __grid_constant__ CUtensorMap residual_map,
                  const __grid_constant__ CUtensorMap shortcut_map, const __grid_constant__ CUtensorMap shortcut_weight_map,
                  const bf16* bias, const bf16* shortcut_bias, float* moments, const bool has_residual, const Shape s) {
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
    wait_for_the_kernel_before();
    start_the_kernel_after();

    if (warpgroup == 0) {
        registers_down<40>();
        const int warp = threadIdx.x / 32;
        if (threadIdx.x % 32 != 0) return;
        if (warp == 0) {
            Ring<kPixelStages> p;
            const auto load = [&](const CUtensorMap* map, int bytes, int channel, int column, int row, int image) {
                barrier_wait(pixels_empty(p.stage), p.parity ^ 1);
                barrier_expect(pixels_full(p.stage), bytes);
                load_box(pixels + p.stage * kPixelBytes<kTaps>, map, pixels_full(p.stage), channel, column, row, image);
                p.next();
            };
            for (int t = blockIdx.x; t < s.tiles; t += gridDim.x) {
                const Tile tile(s, t);
                for (int k = 0; k < s.depth_steps; ++k) {
                    for (int dx = 0; dx < kTaps; ++dx) {
                        load(&x_map, kPixelBytes<kTaps>, k * kDepth, tile.column + s.first_column + dx, tile.row + s.first_row, tile.image);
                    }
                }
                for (int k = 0; k < s.shortcut_steps; ++k)
                    load(&shortcut_map, kPixelBytes<1>, k * kDepth, tile.column, tile.row, tile.image);
            }
        } else if (warp == 1) {
            Ring<kWeightStages> w;
            const auto load = [&](const CUtensorMap* map, int channel, int tap, int out) {
                barrier_wait(weights_empty(w.stage), w.parity ^ 1);
                barrier_expect(weights_full(w.stage), kWeightBytes);
                tma_load(weights + w.stage * kWeightBytes, map, weights_full(w.stage), channel, tap, out);
                w.next();
            };
            for (int t = blockIdx.x; t < s.tiles; t += gridDim.x) {
                const Tile tile(s, t);
                for (int k = 0; k < s.depth_steps; ++k) {
                    for (int tap = 0; tap < kTaps * kTaps; ++tap)
                        load(&weight_map, k * kDepth, tap % kTaps * kTaps + tap / kTaps, tile.channel);
                }
                for (int k = 0; k < s.shortcut_steps; ++k) load(&shortcut_weight_map, k * kDepth, 0, tile.channel);
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
            const auto multiply = [&](int row, bool release_pixels, bool accumulate) {
                barrier_wait(weights_full(w.stage), w.parity);
                const uint64_t a = wgmma_descriptor(weights + w.stage * kWeightBytes + mine * 64 * kDepth * 2);
                const uint64_t b = wgmma_descriptor(pixels + p.stage * kPixelBytes<kTaps> + row * kSide * kDepth * 2);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < kDepth / 16; ++i) wgmma(d, a + 2 * i, b + 2 * i, accumulate || i > 0);
                wgmma_commit();
                wgmma_wait<1>();
                if (weight_before >= 0) barrier_arrive(weights_empty(weight_before), 0, first);
                if (release_pixels && pixel_before >= 0) barrier_arrive(pixels_empty(pixel_before), 0, first);
                weight_before = w.stage;
                w.next();
            };
            for (int step = 0; step < s.depth_steps * kTaps; ++step, p.next()) {
                barrier_wait(pixels_full(p.stage), p.parity);
#pragma unroll
                for (int dy = 0; dy < kTaps; ++dy) multiply(dy, dy == 0, step > 0 || dy > 0);
                pixel_before = p.stage;
            }
            for (int step = 0; step < s.shortcut_steps; ++step, p.next()) {
                barrier_wait(pixels_full(p.stage), p.parity);
                multiply(0, true, true);
                pixel_before = p.stage;
            }
            wgmma_wait<0>();
            barrier_arrive(weights_empty(weight_before), 0, first);
            barrier_arrive(pixels_empty(pixel_before), 0, first);

            const Tile tile(s, t);
            const int channel = tile.channel + 64 * mine + 16 * warp + lane / 4;
            const auto bias_of = [&](int c) {
                if (c >= s.out) return 0.0f;
                return to_float(bias[c]) + (shortcut_bias ? to_float(shortcut_bias[c]) : 0.0f);
            };
            const float bias0 = bias_of(channel), bias1 = bias_of(channel + 8);
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
                    get_matrices(r, place + j * 8 * 128);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        d[4 * j + 2 * i] += __uint_as_float(r[i] << 16);
                        d[4 * j + 2 * i + 1] += __uint_as_float(r[i] & 0xffff0000u);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < kPixels / 8; j += 2) {
                put_matrices(place + j * 8 * 128, pack<bf16>(d[4 * j], d[4 * j + 1]), pack<bf16>(d[4 * j + 2], d[4 * j + 3]),
                                     pack<bf16>(d[4 * j + 4], d[4 * j + 5]), pack<bf16>(d[4 * j + 6], d[4 * j + 7]));
            }
            async_proxy_fence();
            barrier_arrive(out_written(mine), 0, true);

            if (!moments) continue;
            const int valid_rows = min(kSide, s.rows - tile.row), valid_columns = min(kSide, s.columns - tile.column);
            float mean[2], squares[2];
            if (valid_rows * valid_columns == kPixels) {
                moments_of(d, [](int, int) { return true; }, kPixels, mean, squares);
            } else {
                const auto inside = [&](int j, int i) {
                    return j / 2 < valid_rows && j % 2 * 8 + lane % 4 * 2 + i < valid_columns;
                };
                moments_of(d, inside, valid_rows * valid_columns, mean, squares);
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

template <int kTaps>
cudaError_t run(const Conv2dCall& call, cudaStream_t stream) {
    CUtensorMap x, weight, y, residual, shortcut, shortcut_weight;
    const int64_t image = call.height * call.width * call.in;
    bool ok = describe(&x, call.x, {call.in, call.width, call.height, call.batch}, {call.in, call.width * call.in, image},
                       {kDepth, kSide, kSide + kTaps - 1, 1});
    ok = ok && describe(&weight, call.weight, {call.in, kTaps * kTaps, call.out}, {call.in, kTaps * kTaps * call.in},
                        {kDepth, 1, kChannels});
    const auto result = [&](CUtensorMap* map, const void* data) {
        return describe(map, data, {call.out, call.width, call.height, call.batch},
                        {call.pixel_stride, call.row_stride, call.image_stride}, {64, kSide, kSide, 1});
    };
    ok = ok && result(&y, call.y) && result(&residual, call.residual ? call.residual : call.y);
    if (call.shortcut_x) {
        const int64_t shortcut_image = call.height * call.width * call.shortcut_in;
        ok = ok && describe(&shortcut, call.shortcut_x, {call.shortcut_in, call.width, call.height, call.batch},
                            {call.shortcut_in, call.width * call.shortcut_in, shortcut_image}, {kDepth, kSide, kSide, 1});
        ok = ok && describe(&shortcut_weight, call.shortcut_weight, {call.shortcut_in, 1, call.out},
                            {call.shortcut_in, call.shortcut_in}, {kDepth, 1, kChannels});
    } else {
        shortcut = x, shortcut_weight = weight;
    }
    if (!ok) return cudaErrorNotSupported;

    Shape s{};
    s.rows = static_cast<int>(call.height);
    s.columns = static_cast<int>(call.width);
    s.tile_rows = (s.rows + kSide - 1) / kSide;
    s.tile_columns = (s.columns + kSide - 1) / kSide;
    s.channel_tiles = static_cast<int>((call.out + kChannels - 1) / kChannels);
    s.tiles = static_cast<int>(call.batch) * s.tile_rows * s.tile_columns * s.channel_tiles;
    s.depth_steps = static_cast<int>((call.in + kDepth - 1) / kDepth);
    s.shortcut_steps = call.shortcut_x ? static_cast<int>((call.shortcut_in + kDepth - 1) / kDepth) : 0;
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
    return launch(conv2d_kernel<kTaps>, std::min(processors, s.tiles), kThreads, kSharedBytes<kTaps>, stream, /*overlapped=*/true, x,
                  weight, y, residual, shortcut, shortcut_weight, static_cast<const bf16*>(call.bias),
                  static_cast<const bf16*>(call.shortcut_bias), call.moments, call.residual != nullptr, s);
}

}  // namespace

bool conv2d_sm90_takes(int device, int64_t in, int64_t out, int64_t taps) {
    int major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
        return false;
    // Rows of the tensor maps are multiples of 16 bytes.
    return major == 9 && minor == 0 && in % 8 == 0 && out % 8 == 0 && taps >= 2 && taps <= 3 && tensor_map_encoder();
}

cudaError_t conv2d_sm90(const Conv2dCall& call, cudaStream_t stream) {
    switch (call.taps) {
        case 2:
            return run<2>(call, stream);
        case 3:
            return run<3>(call, stream);
        default:
            return cudaErrorNotSupported;
    }
}

}  // namespace diffusionz::kernels
