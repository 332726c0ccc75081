#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// Queries and keys of one segment, as numbers of tokens: the i-th query is token query_begin + i * stride.
struct AttentionSegment {
    int32_t query_begin, query_count, key_begin, key_count, stride;
};

struct SegmentAttentionArguments {
    Type type;  // of q, k, v and y: float16 or bfloat16
    const void *q, *k, *v;
    void* y;
    int64_t q_stride, kv_stride, y_stride;  // numbers from a token to the next; heads of 64 stand side by side
    int32_t heads;
    // [segment_count], on the device. Null: segment i has query_count queries from i * q_segment_stride numbers on, and key_count
    // keys from i * kv_segment_stride on; its results stand one segment after the other.
    const AttentionSegment* segments;
    int64_t q_segment_stride, kv_segment_stride;
    int32_t segment_count;           // at most 65535
    int32_t query_count, key_count;  // with a table query_count is the most that a segment has
    const uint8_t* valid;            // by key token, 0: no query attends to it; null: all do. Not with a table.
    // float32 [positions, 32], or null for no rotation: the i-th key of a segment stands at position i, the queries at its end.
    const float *cos, *sin;
};

cudaError_t segment_attention(const SegmentAttentionArguments& arguments, cudaStream_t stream);

}  // namespace diffusionz::kernels
