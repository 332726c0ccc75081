// y = x W^T for so few rows that the weights' way from memory is what takes time, with what stands around it in a Chronos-2
// layer: the norm of x before it, relu or the sum with the residual stream after it.
//
// A block has 64 outputs of 64 rows over a part of `in`; the blocks of the other parts are its cluster, through whose shared
// memory the partial sums meet, always in the same order. A block asks for all of its weights at once, before it waits for the
// kernel that writes its rows: with overlapped launches the weights come while that kernel works. Products are mma.sync m16n8k16
// with float32 sums; the norm is in float32 and rounded once. A row's result depends on that row alone, whatever the number of
// rows. Limits: compute capability 9.0 on (clusters), in a multiple of 32, out of 64. Reference: ops/stream_linear.cc.

#include <cooperative_groups.h>

#include "kernels/few_rows_linear.h"
#include "kernels/launch.cuh"
#include "kernels/mma.cuh"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kRows = 64, kColumns = 64, kThreads = 256, kPad = 8;
constexpr int kSumPitch = kColumns + 4;
constexpr int kDepthMax = 384;

__device__ inline void copy_async(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

template <class T, int kParts>
__global__ void __launch_bounds__(kThreads) few_rows_kernel(FewRowsLinearArguments p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    extern __shared__ __align__(16) char memory[];
    namespace cg = cooperative_groups;
    const int depth = p.in / kParts, pitch = depth + kPad;
    T *weights = reinterpret_cast<T*>(memory), *rows = weights + kColumns * pitch;
    float* sums = reinterpret_cast<float*>(memory);  // after the product
    const int part = blockIdx.x % kParts, first_column = blockIdx.x / kParts * kColumns, first_row = blockIdx.y * kRows;
    const int begin = part * depth, thread = threadIdx.x, own_row = thread / 4, quarter = thread % 4;
    start_the_kernel_after();

    // Four threads a row, both here and below.
    const T* weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(first_column + own_row) * p.in + begin;
    for (int at = quarter * 8; at < depth; at += 32) copy_async(&weights[own_row * pitch + at], weight + at, true);
    wait_for_the_kernel_before();

    const int row = first_row + own_row;
    const bool there = row < p.rows;
    if (p.x) {
        const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(there ? row : 0) * p.in + begin;
        for (int at = quarter * 8; at < depth; at += 32) copy_async(&rows[own_row * pitch + at], x + at, there);
    } else {
        const float4* x = reinterpret_cast<const float4*>(p.stream + static_cast<int64_t>(there ? row : 0) * p.in + begin);
        const float4* norm = reinterpret_cast<const float4*>(p.norm_weight + begin);
        const int groups = p.in / 64;
        float square = 0.0f;
        for (int i = quarter; i < groups; i += 4) square += p.squares[static_cast<int64_t>(there ? row : 0) * groups + i];
        square += __shfl_xor_sync(~0u, square, 1);
        square += __shfl_xor_sync(~0u, square, 2);
        const float factor = there ? rsqrtf(square / static_cast<float>(p.in) + p.epsilon) : 0.0f;
#pragma unroll 6
        for (int at = quarter; at < depth / 4; at += 4) {
            const float4 a = x[at], w = norm[at];
            const uint2 packed = {pack<T>(a.x * factor * w.x, a.y * factor * w.y),
                                  pack<T>(a.z * factor * w.z, a.w * factor * w.w)};
            *reinterpret_cast<uint2*>(&rows[own_row * pitch + at * 4]) = packed;
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();

    const int warp = thread / 32, lane = thread % 32, tile_row = warp % 4 * 16, tile_column = warp / 4 * 32;
    float sum[4][4] = {};
#pragma unroll 4
    for (int at = 0; at < depth; at += 16) {
        uint32_t a[4], b[2][4];
        load_matrices(a, &rows[(tile_row + lane % 16) * pitch + at + lane / 16 * 8]);
#pragma unroll
        for (int i = 0; i < 2; ++i)
            load_matrices(b[i], &weights[(tile_column + i * 16 + lane / 16 * 8 + lane % 8) * pitch + at + lane / 8 % 2 * 8]);
#pragma unroll
        for (int i = 0; i < 4; ++i) multiply<T>(sum[i], a, b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]);
    }
    __syncthreads();  // all have read rows and weights
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float* to = &sums[(tile_row + lane / 4) * kSumPitch + tile_column + i * 8 + lane % 4 * 2];
        *reinterpret_cast<float2*>(to) = {sum[i][0], sum[i][1]};
        *reinterpret_cast<float2*>(to + 8 * kSumPitch) = {sum[i][2], sum[i][3]};
    }

    // A block of the cluster finishes 64 / kParts of the rows, 16 threads a row.
    constexpr int kOwnRows = kRows / kParts, kItems = (kOwnRows * 16 + kThreads - 1) / kThreads;
    float4 result[kItems];
    const auto place = [&](int item) { return part * kOwnRows + item * (kThreads / 16) + thread / 16; };
    const int column = thread % 16 * 4;
    const bool busy = thread < kOwnRows * 16;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        result[i] = float4{};
        if (busy && p.residual && first_row + place(i) < p.rows)
            result[i] = *reinterpret_cast<const float4*>(p.residual + static_cast<int64_t>(first_row + place(i)) * p.out +
                                                         first_column + column);
    }
    const cg::cluster_group cluster = cg::this_cluster();
    cluster.sync();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        if (!busy) break;
        float4 total{};
#pragma unroll
        for (int other = 0; other < kParts; ++other) {
            const float* theirs = kParts == 1 ? sums : cluster.map_shared_rank(sums, other);
            const float4 some = *reinterpret_cast<const float4*>(theirs + place(i) * kSumPitch + column);
            total = {total.x + some.x, total.y + some.y, total.z + some.z, total.w + some.w};
        }
        result[i] = {result[i].x + total.x, result[i].y + total.y, result[i].z + total.z, result[i].w + total.w};
    }
    // Nobody leaves while others read its sums.
    if (kParts > 1) cluster.sync();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const int at_row = first_row + place(i);
        float4 value = result[i];
        const int64_t at = static_cast<int64_t>(at_row) * p.out + first_column + column;
        const bool written = busy && at_row < p.rows;
        if (p.finish == FewRowsFinish::add) {
            float square = value.x * value.x + value.y * value.y + value.z * value.z + value.w * value.w;
            for (int offset = 8; offset > 0; offset /= 2) square += __shfl_xor_sync(~0u, square, offset);
            if (written) {
                *reinterpret_cast<float4*>(p.sum + at) = value;
                if (column == 0) p.sum_squares[static_cast<int64_t>(at_row) * (p.out / 64) + first_column / 64] = square;
            }
        } else if (written) {
            if (p.finish == FewRowsFinish::relu)
                value = {fmaxf(value.x, 0.0f), fmaxf(value.y, 0.0f), fmaxf(value.z, 0.0f), fmaxf(value.w, 0.0f)};
            *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + at) = {pack<T>(value.x, value.y), pack<T>(value.z, value.w)};
        }
    }
#endif
}

// Parts of `in`: as many blocks as keep the device busy, and no part longer than shared memory holds. By the sizes of the weight
// alone, so that a row's result does not depend on the number of rows.
int parts_of(int64_t in, int64_t out) {
    int parts = 1;
    while (parts < 8 && in % (parts * 2 * 32) == 0 && (in / parts > kDepthMax || out / kColumns * parts < 96)) parts *= 2;
    return parts;
}

template <class T, int kParts>
cudaError_t run(const FewRowsLinearArguments& p, cudaStream_t stream) {
    const int pitch = p.in / kParts + kPad;
    const int factors = (kRows + kColumns) * pitch * static_cast<int>(sizeof(T)),
              sums = kRows * kSumPitch * static_cast<int>(sizeof(float));
    const int bytes = factors > sums ? factors : sums;
    const cudaError_t error = cudaFuncSetAttribute(few_rows_kernel<T, kParts>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   (kRows + kColumns) * (kDepthMax + kPad) * static_cast<int>(sizeof(T)));
    if (error != cudaSuccess) return error;
    const dim3 grid(p.out / kColumns * kParts, (p.rows + kRows - 1) / kRows);
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {kParts, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = kThreads;
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = p.overlapped ? 2 : 1;
    return cudaLaunchKernelEx(&config, few_rows_kernel<T, kParts>, p);
}

template <class T>
cudaError_t run(const FewRowsLinearArguments& p, cudaStream_t stream) {
    switch (parts_of(p.in, p.out)) {
        case 1:
            return run<T, 1>(p, stream);
        case 2:
            return run<T, 2>(p, stream);
        case 4:
            return run<T, 4>(p, stream);
        default:
            return run<T, 8>(p, stream);
    }
}

}  // namespace

bool few_rows_linear_fits(int device, int64_t in, int64_t out) {
    int major = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
    return major >= 9 && in % 32 == 0 && out % kColumns == 0 && in / parts_of(in, out) <= kDepthMax;
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
