#include "chronos/unrolling.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "chronos/quantiles.h"

namespace diffusionz::chronos {
namespace {

const std::vector<double> kPathLevels = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9};

}  // namespace

Unrolling::Unrolling(const ModelConfig& config, const std::vector<Row>& rows, const std::vector<Group>& groups)
    : config_(config), rows_(rows), first_path_(rows.size()), path_stride_(rows.size()) {
    for (const Group& group : groups) {
        const int64_t begin = static_cast<int64_t>(contexts_.size());
        for (int64_t row = group.row_begin; row < group.row_begin + group.row_count; ++row) {
            first_path_[static_cast<size_t>(row)] = begin + row - group.row_begin;
            path_stride_[static_cast<size_t>(row)] = group.row_count;
        }
        for (int64_t path = 0; path < kPaths; ++path) {
            path_groups_.push_back({static_cast<int64_t>(contexts_.size()), group.row_count});
            for (int64_t row = group.row_begin; row < group.row_begin + group.row_count; ++row) {
                const Row& from = rows[static_cast<size_t>(row)];
                contexts_.emplace_back(from.context, from.context + from.context_length);
            }
        }
    }
    path_rows_.resize(contexts_.size());
}

void Unrolling::extend(const std::vector<float>& quantiles, int64_t steps) {
    const size_t levels = config_.quantiles.size();
    at::parallel_for(0, static_cast<int64_t>(rows_.size()), 1, [&](int64_t begin, int64_t end) {
        std::vector<float> values(levels), on_paths(kPaths);
        for (int64_t row = begin; row < end; ++row) {
            const auto r = static_cast<size_t>(row);
            const Row& from = rows_[r];
            const auto path_row = [&](int64_t path) { return static_cast<size_t>(first_path_[r] + path * path_stride_[r]); };
            for (int64_t step = 0; step < steps; ++step) {
                for (size_t level = 0; level < levels; ++level)
                    values[level] = quantiles[(r * levels + level) * static_cast<size_t>(steps) + static_cast<size_t>(step)];
                interpolate_quantiles(config_.quantiles, values.data(), kPathLevels, on_paths.data());
                const int64_t at = done_ + step;
                const float known = from.future && at < from.future_length ? from.future[at] : NAN;
                for (int64_t path = 0; path < kPaths; ++path)
                    contexts_[path_row(path)].push_back(std::isnan(known) ? on_paths[static_cast<size_t>(path)] : known);
            }
            const int64_t at = done_ + steps;
            const bool knows = from.future && from.future_length > at;
            for (int64_t path = 0; path < kPaths; ++path) {
                auto& context = contexts_[path_row(path)];
                const int64_t over = static_cast<int64_t>(context.size()) - config_.context_length;
                if (over > 0) context.erase(context.begin(), context.begin() + over);
                path_rows_[path_row(path)] = {context.data(), static_cast<int64_t>(context.size()),
                                              knows ? from.future + at : nullptr, knows ? from.future_length - at : 0};
            }
        }
    });
    done_ += steps;
}

std::vector<float> Unrolling::mix(const std::vector<float>& on_paths, int64_t steps) const {
    const size_t levels = config_.quantiles.size(), length = static_cast<size_t>(steps);
    const std::vector<double> path_masses = probability_masses(kPathLevels), level_masses = probability_masses(config_.quantiles);
    std::vector<float> mixed(rows_.size() * levels * length);
    at::parallel_for(0, static_cast<int64_t>(rows_.size()), 1, [&](int64_t begin, int64_t end) {
        std::vector<Weighted> samples(kPaths * levels);
        std::vector<float> values(levels);
        for (int64_t row = begin; row < end; ++row) {
            const auto r = static_cast<size_t>(row);
            for (size_t step = 0; step < length; ++step) {
                for (size_t path = 0; path < kPaths; ++path) {
                    const auto path_row = static_cast<size_t>(first_path_[r]) + path * static_cast<size_t>(path_stride_[r]);
                    for (size_t level = 0; level < levels; ++level)
                        samples[path * levels + level] = {on_paths[(path_row * levels + level) * length + step],
                                                          path_masses[path] * level_masses[level]};
                }
                weighted_quantiles(samples, config_.quantiles, values.data());
                for (size_t level = 0; level < levels; ++level) mixed[(r * levels + level) * length + step] = values[level];
            }
        }
    });
    return mixed;
}

}  // namespace diffusionz::chronos
