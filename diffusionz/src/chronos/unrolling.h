// Forecasts past the horizon of one pass, as upstream's pipeline makes them: the forecast so far is appended to the history along
// nine paths, one a quantile level, each is forecast again, and the quantiles of all paths are mixed.
#pragma once

#include <vector>

#include "chronos/config.h"
#include "chronos/tokens.h"

namespace diffusionz::chronos {

class Unrolling {
public:
    static constexpr int64_t kPaths = 9;  // the levels 0.1 to 0.9

    // `rows` and `groups` are of the first pass; what they point to outlives this.
    Unrolling(const ModelConfig& config, const std::vector<Row>& rows, const std::vector<Group>& groups);

    // Appends a pass's forecast, [rows, quantiles, steps], to every path, values that are known in advance instead.
    void extend(const std::vector<float>& quantiles, int64_t steps);

    // What the next pass reads: every row once a path. The rows of a group meet those of the same path.
    const std::vector<Row>& rows() const { return path_rows_; }
    const std::vector<Group>& groups() const { return path_groups_; }

    // Quantiles of the paths, [rows(), quantiles, steps], mixed to [rows, quantiles, steps].
    std::vector<float> mix(const std::vector<float>& on_paths, int64_t steps) const;

private:
    const ModelConfig& config_;
    const std::vector<Row>& rows_;
    int64_t done_ = 0;                          // steps forecast so far
    std::vector<int64_t> first_path_;           // by row: where its first path stands in path_rows_
    std::vector<int64_t> path_stride_;          // by row: from a path to the next, the rows of its group
    std::vector<std::vector<float>> contexts_;  // by path row
    std::vector<Row> path_rows_;
    std::vector<Group> path_groups_;
};

}  // namespace diffusionz::chronos
