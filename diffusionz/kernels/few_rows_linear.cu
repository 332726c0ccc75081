// y = x W^T for so few rows that the weights' way from memory is what takes time, with what stands around it in a Chronos-2
// layer: the norm before it, relu or the sum with the residual stream after it.
//
// The norm's weight is part of W. Its factor is a number a row, so it can follow the product: x is then the stream itself, in 16
// bits, times a factor that keeps it near 1 and that is divided out again - that of the stream one sum earlier, which whoever
// writes the stream knows, while the stream's own is known only when all of its columns are.
//
// A block has 64 rows of 16 or 32 outputs and asks for everything it reads at once: weights before it waits for the kernel that
// writes its rows (with overlapped launches they come while that kernel works), then rows. Its eight warps share `in` between
// them, products are mma.sync m16n8k16 with float32 sums; the warps' sums meet in shared memory, and those of long `in` in the
// shared memory of a cluster of blocks, always in the same order. A row's result depends on that row alone, whatever the number
// of rows. Limits: compute capability 9.0 on (clusters), in a multiple of 32 to 768 or four times that, out of 32. Reference:
// tests/kernels/test_chronos.py.

#include <cooperative_groups.h>

#include "kernels/few_rows_linear.h"
#include "kernels/launch.cuh"
#include "kernels/mma.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kRows = 64, kWarps = 8, kThreads = 32 * kWarps, kPad = 8;
constexpr int kDepthMax = 768;  // of `in` in one block

__device__ inline void copy_async(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

// 1 / sqrt(mean of squares + epsilon), read by four neighbouring threads together; 1 for null.
__device__ inline float norm_factor(const float* squares, int64_t row, int width, float epsilon, int quarter) {
    if (!squares) return 1.0f;
    const int groups = width / kSquaresOf;
    float sum = 0.0f;
    for (int i = quarter; i < groups; i += 4) sum += squares[row * groups + i];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return rsqrtf(sum / static_cast<float>(width) + epsilon);
}

template <class T, int kColumns, int kParts>
__global__ void __launch_bounds__(kThreads) few_rows_kernel(FewRowsLinearArguments p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    extern __shared__ __align__(16) char memory[];
    namespace cg = cooperative_groups;
    constexpr int kTiles = kColumns / 8, kSumPitch = kColumns + 4;
    const int depth = p.in / kParts, pitch = depth + kPad;
    T *rows = reinterpret_cast<T*>(memory), *weights = rows + kRows * pitch;
    float* sums = reinterpret_cast<float*>(memory);  // after the product: [warps, rows, kSumPitch]
    const int part = blockIdx.x % kParts, first_column = blockIdx.x / kParts * kColumns, first_row = blockIdx.y * kRows;
    const int begin = part * depth, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    start_the_kernel_after();

    constexpr int kThreadsAColumn = kThreads / kColumns;
    const T* weight =
        static_cast<const T*>(p.weight) + static_cast<int64_t>(first_column + thread / kThreadsAColumn) * p.in + begin;
    for (int at = thread % kThreadsAColumn * 8; at < depth; at += kThreadsAColumn * 8)
        copy_async(&weights[thread / kThreadsAColumn * pitch + at], weight + at, true);
    wait_for_the_kernel_before();

    // Four threads a row.
    const int quarter = thread % 4, row = first_row + thread / 4;
    const bool there = row < p.rows;
    const int64_t safe_row = there ? row : 0;
    const T* x = static_cast<const T*>(p.x) + safe_row * p.in + begin;
    for (int at = quarter * 8; at < depth; at += 32) copy_async(&rows[thread / 4 * pitch + at], x + at, there);
    // While they come: what the end needs. A thread finishes 4 columns, and 4 more 16 columns on, of its row.
    const bool adds = p.finish == FewRowsFinish::add;
    float factor = 1.0f, next_factor = 1.0f;
    float4 result[kColumns / 16];
    if (p.squares) {
        factor = norm_factor(p.squares, safe_row, p.in, p.epsilon, quarter) /
                 norm_factor(p.x_squares, safe_row, p.in, p.epsilon, quarter);
    }
    if (adds) next_factor = norm_factor(p.residual_squares, safe_row, p.out, p.epsilon, quarter);
    const int64_t at_end = safe_row * p.out + first_column + quarter * 4;
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i)
        result[i] = adds && p.residual ? *reinterpret_cast<const float4*>(p.residual + at_end + i * 16) : float4{};
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();

    float sum[kRows / 16][kTiles][4] = {};
#pragma unroll 2
    for (int at = warp * 16; at < depth; at += kWarps * 16) {
        uint32_t b[kTiles / 2][4];
#pragma unroll
        for (int i = 0; i < kTiles / 2; ++i)
            load_matrices(b[i], &weights[(i * 16 + lane / 16 * 8 + lane % 8) * pitch + at + lane / 8 % 2 * 8]);
#pragma unroll
        for (int m = 0; m < kRows / 16; ++m) {
            uint32_t a[4];
            load_matrices(a, &rows[(m * 16 + lane % 16) * pitch + at + lane / 16 * 8]);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) multiply<T>(sum[m][i], a, b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
        }
    }
    __syncthreads();  // all have read rows and weights
#pragma unroll
    for (int m = 0; m < kRows / 16; ++m) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            float* to = &sums[(warp * kRows + m * 16 + lane / 4) * kSumPitch + i * 8 + lane % 4 * 2];
            *reinterpret_cast<float2*>(to) = {sum[m][i][0], sum[m][i][1]};
            *reinterpret_cast<float2*>(to + 8 * kSumPitch) = {sum[m][i][2], sum[m][i][3]};
        }
    }
    __syncthreads();
    float4 total[kColumns / 16];
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
        const float* own = &sums[thread / 4 * kSumPitch + i * 16 + quarter * 4];
        total[i] = *reinterpret_cast<const float4*>(own);
#pragma unroll
        for (int other = 1; other < kWarps; ++other) {
            const float4 some = *reinterpret_cast<const float4*>(own + other * kRows * kSumPitch);
            total[i] = {total[i].x + some.x, total[i].y + some.y, total[i].z + some.z, total[i].w + some.w};
        }
    }
    bool mine = there;
    if constexpr (kParts > 1) {
        // Each block of the cluster finishes its share of the rows. A thread's number is in the first warp's place.
        const cg::cluster_group cluster = cg::this_cluster();
        float* place = &sums[thread / 4 * kSumPitch + quarter * 4];
#pragma unroll
        for (int i = 0; i < kColumns / 16; ++i) *reinterpret_cast<float4*>(place + i * 16) = total[i];
        cluster.sync();
        mine = there && thread / 4 / (kRows / kParts) == part;
        if (mine) {
#pragma unroll
            for (int i = 0; i < kColumns / 16; ++i) {
                total[i] = float4{};
#pragma unroll
                for (int other = 0; other < kParts; ++other) {
                    const float4 some = *reinterpret_cast<const float4*>(cluster.map_shared_rank(place, other) + i * 16);
                    total[i] = {total[i].x + some.x, total[i].y + some.y, total[i].z + some.z, total[i].w + some.w};
                }
            }
        }
        cluster.sync();  // nobody leaves while others read its sums
    }
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
        float4 value = {total[i].x * factor, total[i].y * factor, total[i].z * factor, total[i].w * factor};
        if (adds) {
            value = {value.x + result[i].x, value.y + result[i].y, value.z + result[i].z, value.w + result[i].w};
            float square = value.x * value.x + value.y * value.y + value.z * value.z + value.w * value.w;
            square += __shfl_xor_sync(~0u, square, 1);
            square += __shfl_xor_sync(~0u, square, 2);
            if (mine) {
                *reinterpret_cast<float4*>(p.sum + at_end + i * 16) = value;
                if (quarter == 0) p.sum_squares[safe_row * (p.out / kSquaresOf) + first_column / kSquaresOf + i] = square;
            }
            value = {value.x * next_factor, value.y * next_factor, value.z * next_factor, value.w * next_factor};
        } else if (p.finish == FewRowsFinish::relu) {
            value = {fmaxf(value.x, 0.0f), fmaxf(value.y, 0.0f), fmaxf(value.z, 0.0f), fmaxf(value.w, 0.0f)};
        }
        if (mine)
            *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + at_end + i * 16) = {pack<T>(value.x, value.y),
                                                                                 pack<T>(value.z, value.w)};
    }
#endif
}

// By the sizes of the weight alone, so that a row's result does not depend on the number of rows.
int parts_of(int64_t in) { return in <= kDepthMax ? 1 : 4; }
int columns_of(int64_t out) { return out >= 2048 ? 32 : 16; }

template <class T, int kColumns, int kParts>
cudaError_t run(const FewRowsLinearArguments& p, cudaStream_t stream) {
    const auto bytes_of = [](int depth) {
        const int factors = (kRows + kColumns) * (depth + kPad) * static_cast<int>(sizeof(T));
        const int sums = kWarps * kRows * (kColumns + 4) * static_cast<int>(sizeof(float));
        return factors > sums ? factors : sums;
    };
    const cudaError_t error = cudaFuncSetAttribute(few_rows_kernel<T, kColumns, kParts>,
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, bytes_of(kDepthMax));
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(p.out / kColumns * kParts, (p.rows + kRows - 1) / kRows);
    config.blockDim = kThreads;
    config.dynamicSmemBytes = bytes_of(p.in / kParts);
    config.stream = stream;
    config.attrs = attributes;
    if (p.overlapped) {
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (kParts > 1) {
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {kParts, 1, 1};
    }
    return cudaLaunchKernelEx(&config, few_rows_kernel<T, kColumns, kParts>, p);
}

template <class T>
cudaError_t run(const FewRowsLinearArguments& p, cudaStream_t stream) {
    const bool wide = columns_of(p.out) == 32;
    if (parts_of(p.in) == 1) return wide ? run<T, 32, 1>(p, stream) : run<T, 16, 1>(p, stream);
    return wide ? run<T, 32, 4>(p, stream) : run<T, 16, 4>(p, stream);
}

}  // namespace

bool few_rows_linear_fits(int device, int64_t in, int64_t out) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
    const int64_t depth = in / parts_of(in);
    return major >= 9 && in % (32 * parts_of(in)) == 0 && depth <= kDepthMax && out % columns_of(out) == 0;
}

cudaError_t few_rows_linear(const FewRowsLinearArguments& p, cudaStream_t stream) {
    if (p.rows == 0) return cudaSuccess;
    switch (p.type) {
        case Type::float16:
            return run<__half>(p, stream);
        case Type::bfloat16:
            return run<__nv_bfloat16>(p, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace diffusionz::kernels
