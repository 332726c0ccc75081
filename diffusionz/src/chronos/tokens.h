// Rows of history become tokens: scaled, cut into patches, packed one row after the other, with what attends to what.
//
// Upstream pads a batch to its longest row and masks the padding in a [batch, batch] matrix per patch. Here a token exists only
// where a patch holds an observation: a masked token changes no other one, so leaving it out is exact up to rounding.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "chronos/config.h"
#include "ops/segment_attention.h"

namespace diffusionz::chronos {

// What one pass reads of a row. NaN is missing.
struct Row {
    const float* context;  // [context_length], its end is now
    int64_t context_length;
    const float* future;  // [future_length], known values from now on; null for none
    int64_t future_length;
};

// Rows that attend to each other, which stand side by side.
struct Group {
    int64_t row_begin, row_count;
};

// Standardisation of a row: (x - loc) / scale.
struct Scale {
    float loc, scale;
};

// Attention over a group's rows at each patch. The tokens of groups with several rows come first in the batch; `order` lists them
// patch by patch, so that each segment is one patch of one group.
struct GroupAttention {
    int64_t shared_count = 0;
    at::Tensor order;  // int64 [shared_count]
    std::vector<Segment> segments;
};

struct Tokens {
    int64_t count = 0;
    int64_t output_patches = 0;
    at::Tensor features;                   // float32 [count, 3 * patch]: time encoding, values, observed or not
    at::Tensor positions;                  // int64 [count], patches from the row's first
    at::Tensor registers;                  // int64, tokens that are the register
    at::Tensor outputs;                    // int64 [rows * output_patches], tokens whose patch is forecast
    at::Tensor output_positions;           // int64 [rows * output_patches]
    std::vector<Segment> time;             // a row's tokens to themselves
    std::vector<Segment> output_time;      // a row's outputs to its tokens
    GroupAttention group;                  // over all tokens
    GroupAttention output_group;           // over the outputs
    std::vector<Scale> scales;             // by row
    std::vector<int64_t> row_begin;        // [rows + 1], tokens
    std::vector<int64_t> context_patches;  // by row, missing ones included
};

// The most tokens that a row can have.
int64_t token_count_max(const ModelConfig& config, int64_t context_length, int64_t output_patches);

// Rows in the order of `groups`, those of several rows first. `fold_single`: groups of one need no attention over rows, and get
// none.
Tokens make_tokens(const ModelConfig& config, const std::vector<Row>& rows, const std::vector<Group>& groups,
                   int64_t output_patches, bool fold_single);

}  // namespace diffusionz::chronos
