#include "chronos/tokens.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

namespace diffusionz::chronos {
namespace {

constexpr float kScaleOfConstant = 1e-5f;  // upstream's InstanceNorm

int64_t patches_of(int64_t steps, int64_t patch) { return (steps + patch - 1) / patch; }

// Mean and population standard deviation of what is observed; 0 and 1 for nothing. In float64: in float32 the mean of many large
// numbers is off by more than their spread.
Scale scale_of(const Row& row) {
    double sum = 0.0;
    int64_t count = 0;
    for (int64_t i = 0; i < row.context_length; ++i) {
        if (std::isnan(row.context[i])) continue;
        sum += row.context[i];
        ++count;
    }
    if (count == 0) return {0.0f, 1.0f};
    const float loc = static_cast<float>(sum / static_cast<double>(count));
    double squares = 0.0;
    for (int64_t i = 0; i < row.context_length; ++i) {
        if (std::isnan(row.context[i])) continue;
        const double deviation = static_cast<double>(row.context[i]) - loc;
        squares += deviation * deviation;
    }
    const float scale = static_cast<float>(std::sqrt(squares / static_cast<double>(count)));
    return {loc, scale == 0.0f ? kScaleOfConstant : scale};
}

bool observed(const float* values, int64_t begin, int64_t end) {
    return std::any_of(values + begin, values + end, [](float value) { return !std::isnan(value); });
}

// A row's patches that become tokens, counted from its first. Its first patch may begin before the row does.
std::vector<int32_t> observed_patches(const ModelConfig& config, const Row& row) {
    const int64_t count = patches_of(row.context_length, config.patch), lead = count * config.patch - row.context_length;
    std::vector<int32_t> patches;
    for (int64_t patch = 0; patch < count; ++patch) {
        if (observed(row.context, std::max<int64_t>(0, patch * config.patch - lead), (patch + 1) * config.patch - lead))
            patches.push_back(static_cast<int32_t>(patch));
    }
    return patches;
}

// One patch's features. `first` is its first step's index in `values`, which has `count`; `time` that step's distance from now.
void write_patch(const ModelConfig& config, const Scale& scale, const float* values, int64_t count, int64_t first, int64_t time,
                 float* out) {
    for (int64_t i = 0; i < config.patch; ++i) {
        const int64_t at = first + i;
        const float value = values && at >= 0 && at < count ? values[at] : NAN;
        const bool known = !std::isnan(value);
        const float scaled = known ? static_cast<float>((static_cast<double>(value) - scale.loc) / scale.scale) : 0.0f;
        out[i] = static_cast<float>(time + i) / static_cast<float>(config.time_encoding_scale);
        out[config.patch + i] = config.arcsinh ? std::asinh(scaled) : scaled;
        out[2 * config.patch + i] = known ? 1.0f : 0.0f;
    }
}

at::Tensor index_tensor(const std::vector<int64_t>& values) { return at::tensor(values, at::TensorOptions().dtype(at::kLong)); }

// Groups' attention over places of their rows: token_at(row, place) is a token, or -1 where the row has none. Places of one
// number are the same patch, counted from now.
template <class TokenAt>
GroupAttention group_attention(const std::vector<Group>& groups, bool fold_single, const std::vector<int64_t>& place_begin,
                               int64_t place_end, TokenAt&& token_at) {
    GroupAttention attention;
    std::vector<int64_t> order;
    for (size_t i = 0; i < groups.size(); ++i) {
        const Group& group = groups[i];
        if (fold_single && group.row_count == 1) break;  // the rest stand alone
        for (int64_t place = place_begin[i]; place < place_end; ++place) {
            const int64_t begin = static_cast<int64_t>(order.size());
            for (int64_t row = group.row_begin; row < group.row_begin + group.row_count; ++row) {
                const int64_t token = token_at(row, place);
                if (token >= 0) order.push_back(token);
            }
            const int64_t count = static_cast<int64_t>(order.size()) - begin;
            if (count > 0) attention.segments.push_back({begin, count, begin, count});
        }
    }
    attention.shared_count = static_cast<int64_t>(order.size());
    attention.order = index_tensor(order);
    return attention;
}

}  // namespace

int64_t token_count_max(const ModelConfig& config, int64_t context_length, int64_t output_patches) {
    return patches_of(std::min(context_length, config.context_length), config.patch) + config.register_token + output_patches;
}

Tokens make_tokens(const ModelConfig& config, const std::vector<Row>& rows, const std::vector<Group>& groups,
                   int64_t output_patches, bool fold_single) {
    Tokens tokens;
    tokens.output_patches = output_patches;
    const int64_t row_count = static_cast<int64_t>(rows.size()), extra = config.register_token + output_patches;
    std::vector<std::vector<int32_t>> patches(rows.size());
    tokens.scales.resize(rows.size());
    at::parallel_for(0, row_count, 16, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            patches[static_cast<size_t>(row)] = observed_patches(config, rows[static_cast<size_t>(row)]);
            tokens.scales[static_cast<size_t>(row)] = scale_of(rows[static_cast<size_t>(row)]);
        }
    });
    tokens.row_begin.push_back(0);
    for (const auto& observed : patches)
        tokens.row_begin.push_back(tokens.row_begin.back() + static_cast<int64_t>(observed.size()) + extra);
    tokens.count = tokens.row_begin.back();

    const int64_t width = 3 * config.patch;
    tokens.features = at::zeros({tokens.count, width}, at::TensorOptions().dtype(at::kFloat));
    tokens.positions = at::empty({tokens.count}, at::TensorOptions().dtype(at::kLong));
    float* features = tokens.features.mutable_data_ptr<float>();
    int64_t* positions = tokens.positions.mutable_data_ptr<int64_t>();
    std::vector<int64_t> registers, outputs;
    for (int64_t row = 0; row < row_count; ++row) {
        const auto r = static_cast<size_t>(row);
        const int64_t begin = tokens.row_begin[r], end = tokens.row_begin[r + 1];
        tokens.context_patches.push_back(patches_of(rows[r].context_length, config.patch));
        tokens.time.push_back({begin, end - begin, begin, end - begin});
        tokens.output_time.push_back({row * output_patches, output_patches, begin, end - begin});
        if (config.register_token) registers.push_back(end - extra);
        for (int64_t patch = 0; patch < output_patches; ++patch) outputs.push_back(end - output_patches + patch);
    }
    at::parallel_for(0, row_count, 16, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
            const auto r = static_cast<size_t>(row);
            const int64_t count = tokens.context_patches[r], lead = count * config.patch - rows[r].context_length;
            int64_t token = tokens.row_begin[r];
            for (const int32_t patch : patches[r]) {
                write_patch(config, tokens.scales[r], rows[r].context, rows[r].context_length, patch * config.patch - lead,
                            (patch - count) * config.patch, features + token * width);
                positions[token++] = patch;
            }
            if (config.register_token) positions[token++] = count;
            for (int64_t patch = 0; patch < output_patches; ++patch) {
                write_patch(config, tokens.scales[r], rows[r].future, rows[r].future_length, patch * config.patch,
                            patch * config.patch, features + token * width);
                positions[token++] = count + config.register_token + patch;
            }
        }
    });
    tokens.registers = index_tensor(registers);
    tokens.outputs = index_tensor(outputs);
    tokens.output_positions = tokens.positions.index_select(0, tokens.outputs);

    // Places count from the end of the context: -1 is its last patch, then come register and future.
    std::vector<int64_t> first_place, zeros(groups.size(), 0);
    for (const Group& group : groups) {
        int64_t longest = 0;
        for (int64_t row = group.row_begin; row < group.row_begin + group.row_count; ++row)
            longest = std::max(longest, tokens.context_patches[static_cast<size_t>(row)]);
        first_place.push_back(-longest);
    }
    tokens.group = group_attention(groups, fold_single, first_place, extra, [&](int64_t row, int64_t place) -> int64_t {
        const auto r = static_cast<size_t>(row);
        const auto& own = patches[r];
        if (place >= 0) return tokens.row_begin[r] + static_cast<int64_t>(own.size()) + place;
        const auto found = std::lower_bound(own.begin(), own.end(), tokens.context_patches[r] + place);
        const bool there = found != own.end() && *found == tokens.context_patches[r] + place;
        return there ? tokens.row_begin[r] + (found - own.begin()) : -1;
    });
    tokens.output_group = group_attention(groups, fold_single, zeros, output_patches,
                                          [&](int64_t row, int64_t place) { return row * output_patches + place; });
    return tokens;
}

}  // namespace diffusionz::chronos
