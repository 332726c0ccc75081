// y = softmax(rope(q) rope(k)^T) v within segments of tokens, heads of 64, without the 1 / sqrt(64): Chronos-2's attention over
// time, whose segments are a row's tokens, and over groups, whose segments are one patch of several rows.
//
// A block of four warps has 64 queries of one head of one segment, and passes over the keys 64 at a time: with 50 tokens a row
// that is once. Queries and keys are rotated in float32 as they are read, and rounded to 16 bits again; products are mma.sync
// m16n8k16 with float32 sums; the softmax is in float32 with a running maximum (Dao 2022), its weights rounded to 16 bits for the
// second product, their sum not. A masked key has the score -1e30: where every key is masked the result is finite, and means
// nothing. Limits: heads of 64, segments of less than 2^31 tokens. Reference: ops/segment_attention.cc.

#include "kernels/mma.cuh"
#include "kernels/rows.cuh"
#include "kernels/segment_attention.h"
#include "kernels/vector.cuh"

namespace diffusionz::kernels {
namespace {

constexpr int kHead = 64, kBlock = 64, kWarps = 4, kThreads = 32 * kWarps;
constexpr int kPitch = kHead + 8;  // of a row in shared memory: rows of a ldmatrix fall on different banks
constexpr float kMasked = -1e30f, kLog2E = 1.4426950408889634f;

__device__ inline void copy_async(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

// Rows first to first + 64 of a segment on their way into shared memory; rows from `count` on are zero. A thread has 8 numbers of
// a row's first half and their partners of the second, four threads a row.
template <class T>
__device__ inline void request_rows(T (*tile)[kPitch], const T* rows, int64_t stride, int first, int count) {
    const int column = threadIdx.x % 4 * 8;
#pragma unroll
    for (int row = threadIdx.x / 4; row < kBlock; row += kThreads / 4) {
        const bool there = first + row < count;
        const T* source = rows + (there ? first + row : 0) * stride + column;
        copy_async(&tile[row][column], source, there);
        copy_async(&tile[row][column + kHead / 2], source + kHead / 2, there);
    }
}

// Rotates what the thread has requested, once it is there. `position` is that of the tile's first row.
template <class T>
__device__ inline void rotate_rows(T (*tile)[kPitch], const float* cos, const float* sin, int64_t position, int count) {
    const int column = threadIdx.x % 4 * 8;
#pragma unroll
    for (int row = threadIdx.x / 4; row < kBlock; row += kThreads / 4) {
        if (row >= count) continue;
        const int64_t at = (position + row) * (kHead / 2) + column;
        Vector<T> low = *reinterpret_cast<Vector<T>*>(&tile[row][column]),
                  high = *reinterpret_cast<Vector<T>*>(&tile[row][column + kHead / 2]);
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const float4 c = *reinterpret_cast<const float4*>(cos + at + i), s = *reinterpret_cast<const float4*>(sin + at + i);
            const float cosines[4] = {c.x, c.y, c.z, c.w}, sines[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float a = to_float(low.values[i + j]), b = to_float(high.values[i + j]);
                low.values[i + j] = from_float<T>(a * cosines[j] - b * sines[j]);
                high.values[i + j] = from_float<T>(b * cosines[j] + a * sines[j]);
            }
        }
        *reinterpret_cast<Vector<T>*>(&tile[row][column]) = low;
        *reinterpret_cast<Vector<T>*>(&tile[row][column + kHead / 2]) = high;
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) attention_kernel(SegmentAttentionArguments p) {
    __shared__ __align__(16) T queries[kBlock][kPitch], keys[kBlock][kPitch], values[kBlock][kPitch];
    __shared__ float bias[kBlock];
    between_kernels();
    AttentionSegment segment{0, p.query_count, 0, p.key_count, 1};
    int64_t q_begin = blockIdx.z * p.q_segment_stride, kv_begin = blockIdx.z * p.kv_segment_stride,
            y_begin = static_cast<int64_t>(blockIdx.z) * p.query_count * p.y_stride;
    if (p.segments) {
        segment = p.segments[blockIdx.z];
        q_begin = segment.query_begin * p.q_stride;
        kv_begin = segment.key_begin * p.kv_stride;
        y_begin = segment.query_begin * p.y_stride;
    }
    const uint8_t* valid = p.valid ? p.valid + static_cast<int64_t>(blockIdx.z) * p.key_count : nullptr;
    const int first_query = blockIdx.x * kBlock, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (first_query >= segment.query_count) return;
    const T *q = static_cast<const T*>(p.q) + q_begin + head * kHead, *k = static_cast<const T*>(p.k) + kv_begin + head * kHead,
            *v = static_cast<const T*>(p.v) + kv_begin + head * kHead;
    const int64_t q_step = p.q_stride * segment.stride, kv_step = p.kv_stride * segment.stride;
    uint32_t query[kHead / 16][4];
    float out[kHead / 8][4] = {}, top[2] = {kMasked, kMasked}, sum[2] = {};
    for (int first = 0; first < segment.key_count; first += kBlock) {
        if (first > 0) __syncthreads();  // the keys before are read
        if (first == 0) request_rows(queries, q, q_step, first_query, segment.query_count);
        request_rows(keys, k, kv_step, first, segment.key_count);
        request_rows(values, v, kv_step, first, segment.key_count);
        if (threadIdx.x < kBlock) {
            const int key = first + threadIdx.x;
            bias[threadIdx.x] = key < segment.key_count && (!valid || valid[key]) ? 0.0f : kMasked;
        }
        asm volatile("cp.async.wait_all;" ::: "memory");
        if (p.cos) {
            if (first == 0)
                rotate_rows(queries, p.cos, p.sin, segment.key_count - segment.query_count + first_query,
                            segment.query_count - first_query);
            rotate_rows(keys, p.cos, p.sin, first, segment.key_count - first);
        }
        __syncthreads();
        if (first == 0) {
#pragma unroll
            for (int step = 0; step < kHead / 16; ++step)
                load_matrices(query[step], &queries[warp * 16 + lane % 16][step * 16 + lane / 16 * 8]);
        }
        float scores[kBlock / 8][4] = {};
#pragma unroll
        for (int step = 0; step < kHead / 16; ++step) {
#pragma unroll
            for (int tile = 0; tile < kBlock / 8; tile += 2) {
                uint32_t b[4];  // two tiles' halves of k
                load_matrices(b, &keys[tile * 8 + lane / 16 * 8 + lane % 8][step * 16 + lane / 8 % 2 * 8]);
                multiply<T>(scores[tile], query[step], b[0], b[1]);
                multiply<T>(scores[tile + 1], query[step], b[2], b[3]);
            }
        }
        // A thread has two rows of the scores, and of each every fourth pair of columns.
        float highest[2] = {top[0], top[1]};
#pragma unroll
        for (int tile = 0; tile < kBlock / 8; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float masked = bias[tile * 8 + lane % 4 * 2 + i % 2];
                scores[tile][i] = masked == 0.0f ? scores[tile][i] * kLog2E : kMasked;
                highest[i / 2] = fmaxf(highest[i / 2], scores[tile][i]);
            }
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            highest[row] = fmaxf(highest[row], __shfl_xor_sync(~0u, highest[row], 1));
            highest[row] = fmaxf(highest[row], __shfl_xor_sync(~0u, highest[row], 2));
            const float shrink = exp2f(top[row] - highest[row]);
            top[row] = highest[row];
            sum[row] *= shrink;
#pragma unroll
            for (int tile = 0; tile < kHead / 8; ++tile) {
                out[tile][row * 2] *= shrink;
                out[tile][row * 2 + 1] *= shrink;
            }
        }
#pragma unroll
        for (int tile = 0; tile < kBlock / 8; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                scores[tile][i] = exp2f(scores[tile][i] - top[i / 2]);
                sum[i / 2] += scores[tile][i];
            }
        }
#pragma unroll
        for (int step = 0; step < kBlock / 16; ++step) {
            const float *left = scores[2 * step], *right = scores[2 * step + 1];
            const uint32_t weights[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                                         pack<T>(right[2], right[3])};
#pragma unroll
            for (int tile = 0; tile < kHead / 8; tile += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, &values[step * 16 + lane % 16][tile * 8 + lane / 16 * 8]);
                multiply<T>(out[tile], weights, b[0], b[1]);
                multiply<T>(out[tile + 1], weights, b[2], b[3]);
            }
        }
    }
    __syncwarp();  // all have read the warp's queries, whose place the results take
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        sum[row] += __shfl_xor_sync(~0u, sum[row], 1);
        sum[row] += __shfl_xor_sync(~0u, sum[row], 2);
        const float factor = 1.0f / sum[row];
#pragma unroll
        for (int tile = 0; tile < kHead / 8; ++tile) {
            *reinterpret_cast<uint32_t*>(&queries[warp * 16 + row * 8 + lane / 4][tile * 8 + lane % 4 * 2]) =
                pack<T>(out[tile][row * 2] * factor, out[tile][row * 2 + 1] * factor);
        }
    }
    __syncwarp();  // a warp's rows are its own
    T* y = static_cast<T*>(p.y) + y_begin + head * kHead;
    const int64_t y_step = p.y_stride * segment.stride;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
        const int row = warp * 16 + part * 4 + lane / 8, column = lane % 8 * 8;
        if (first_query + row < segment.query_count)
            *reinterpret_cast<Vector<T>*>(y + (first_query + row) * y_step + column) =
                *reinterpret_cast<const Vector<T>*>(&queries[row][column]);
    }
}

template <class T>
cudaError_t run(const SegmentAttentionArguments& p, cudaStream_t stream) {
    const dim3 grid((p.query_count + kBlock - 1) / kBlock, p.heads, p.segment_count);
    return launch(attention_kernel<T>, grid, kThreads, 0, stream, /*overlapped=*/true, p);
}

}  // namespace

cudaError_t segment_attention(const SegmentAttentionArguments& p, cudaStream_t stream) {
    if (p.segment_count == 0 || p.query_count == 0) return cudaSuccess;
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
