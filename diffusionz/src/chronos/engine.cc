#include "chronos/engine.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <span>
#include <unordered_map>

#include "chronos/quantiles.h"
#include "chronos/unrolling.h"
#include "core/device.h"
#include "core/error.h"

namespace diffusionz::chronos {
namespace {

constexpr int64_t kPredictionLengthMax = 1 << 20;
constexpr int64_t kLevelCountMax = 1000;
// Enough rows to fill the cores, few enough to stay near the caches; a GPU wants more at once.
constexpr int64_t kWorkingMemoryCpu = int64_t{64} << 20, kWorkingMemoryCuda = int64_t{2} << 30;
constexpr int64_t kWorkingMemoryMin = int64_t{1} << 20;

int64_t row_length(const ChronosRequest& request, int64_t row) {
    return request.context_offsets[row + 1] - request.context_offsets[row];
}

bool is_target(const ChronosRequest& request, int64_t row) {
    return !request.row_kinds || request.row_kinds[row] == CHRONOS_ROW_TARGET;
}

// The first of rows that have the lowest index among those that `refuse` names, found by all threads; -1 for none.
template <class Refuse>
int64_t first_row(int64_t row_count, Refuse&& refuse) {
    std::atomic<int64_t> found{row_count};
    at::parallel_for(0, row_count, 256, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end && row < found; ++row) {
            if (!refuse(row)) continue;
            int64_t best = found;
            while (row < best && !found.compare_exchange_weak(best, row)) {
            }
            return;
        }
    });
    return found == row_count ? -1 : found.load();
}

void check_flag(const char* name, int32_t value) {
    if (value != 0 && value != 1) fail(DIFFUSIONZ_E_ARGUMENT, name, " is ", value, "; it must be 0 or 1");
}

// Products of float32 factors in TF32 or not, for its lifetime. ATen's switch is the process's: the first that wants TF32 sets
// it, the last sets it back, and who wants float32 is not moved by it.
class Float32Products {
public:
    explicit Float32Products(bool tf32) : tf32_(tf32) {
        if (!tf32_) {
            exact_.emplace();
            return;
        }
        const std::lock_guard lock(mutex_);
        if (users_++ > 0) return;
        before_ = at::globalContext().allowTF32CuBLAS();
        at::globalContext().setAllowTF32CuBLAS(true);
    }
    ~Float32Products() {
        if (!tf32_) return;
        const std::lock_guard lock(mutex_);
        if (--users_ == 0) at::globalContext().setAllowTF32CuBLAS(before_);
    }
    Float32Products(const Float32Products&) = delete;
    Float32Products& operator=(const Float32Products&) = delete;

private:
    static inline std::mutex mutex_;
    static inline int users_ = 0;
    static inline bool before_ = false;
    bool tf32_;
    std::optional<at::NoTF32Guard> exact_;
};

}  // namespace

// The rows of a request in the order of computation.
struct Engine::Batch {
    std::vector<int64_t> rows;    // of the request
    std::vector<Group> groups;    // over `rows`
    std::vector<int64_t> tokens;  // of each group, at most, without outputs
};

Engine::Engine(const std::filesystem::path& path, const std::filesystem::path& lora, Placement placement,
               int64_t working_memory_bytes)
    : stream_(placement.device) {
    const c10::InferenceMode inference;
    if (working_memory_bytes != 0 && working_memory_bytes < kWorkingMemoryMin)
        fail(DIFFUSIONZ_E_ARGUMENT, "working_memory_bytes is ", working_memory_bytes, "; it must be 0 or at least ",
             kWorkingMemoryMin);
    const int64_t usual = placement.device.is_cpu() ? kWorkingMemoryCpu : kWorkingMemoryCuda;
    working_memory_bytes_ = working_memory_bytes ? working_memory_bytes : usual;
    model_ = Model::load(path, lora, placement);
    row_pass_ = std::make_unique<RowPass>(model_);
}

int64_t Engine::context_length(const ChronosRequest& request) const {
    return request.context_length ? request.context_length : model_->config().context_length;
}

int64_t Engine::steps_read(const ChronosRequest& request, int64_t row) const {
    return std::min(row_length(request, row), context_length(request));
}

template <class StepsOf>
int64_t Engine::group_tokens(const Group& group, StepsOf&& steps_of) const {
    int64_t tokens = 0;
    for (int64_t row = group.row_begin; row < group.row_begin + group.row_count; ++row)
        tokens += token_count_max(model_->config(), steps_of(row), 0);
    return tokens;
}

void Engine::check(const ChronosRequest& request, bool embed) const {
    const auto refuse = [](const auto&... parts) { fail(DIFFUSIONZ_E_ARGUMENT, parts...); };
    // Rows are counted in an int32_t by the task.
    if (request.row_count < 1 || request.row_count > INT32_MAX)
        refuse("row_count is ", request.row_count, "; it must be from 1 to ", INT32_MAX);
    if (!request.context) refuse("context is NULL");
    if (!request.context_offsets) refuse("context_offsets is NULL");
    if (request.context_offsets[0] != 0) refuse("context_offsets[0] is ", request.context_offsets[0], "; it must be 0");
    for (int64_t row = 0; row < request.row_count; ++row) {
        const int64_t begin = request.context_offsets[row], end = request.context_offsets[row + 1];
        if (end <= begin)
            refuse("row ", row, " has no values (context_offsets ", begin, " to ", end, "); a row has at least one");
    }
    const int64_t longest = model_->config().context_length;
    if (request.context_length < 0 || request.context_length > longest)
        refuse("context_length is ", request.context_length, "; it must be from 1 to the model's ", longest, ", or 0 for that");
    if (request.reserved != 0) refuse("reserved is ", request.reserved, "; it must be 0");
    const int64_t infinite = first_row(request.row_count, [&](int64_t row) {
        return std::any_of(request.context + request.context_offsets[row], request.context + request.context_offsets[row + 1],
                           [](float value) { return std::isinf(value); });
    });
    if (infinite >= 0) {
        const float* values = request.context + request.context_offsets[infinite];
        const int64_t at =
            std::find_if(values, values + row_length(request, infinite), [](float v) { return std::isinf(v); }) - values;
        refuse("row ", infinite, " is infinite at step ", at, "; values must be finite, or NaN where they are missing");
    }
    if (embed) return;

    if (request.prediction_length < 1 || request.prediction_length > kPredictionLengthMax)
        refuse("prediction_length is ", request.prediction_length, "; it must be from 1 to ", kPredictionLengthMax);
    check_flag("monotone", request.monotone);
    check_flag("constrain_ohlc", request.constrain_ohlc);
    if (request.level_count < 0 || request.level_count > kLevelCountMax)
        refuse("level_count is ", request.level_count, "; it must be from 1 to ", kLevelCountMax,
               ", or 0 for the model's levels");
    if (request.level_count > 0 && !request.quantile_levels)
        refuse("quantile_levels is NULL and level_count ", request.level_count);
    for (int32_t i = 0; i < request.level_count; ++i) {
        const double level = request.quantile_levels[i];
        if (!(level > 0 && level < 1)) refuse("quantile_levels[", i, "] is ", level, "; a level must be over 0 and under 1");
        if (i > 0 && !(level > request.quantile_levels[i - 1]))
            refuse("quantile_levels[", i, "] is ", level, " after ", request.quantile_levels[i - 1], "; levels must ascend");
    }
    if (request.row_kinds) {
        for (int64_t row = 0; row < request.row_count; ++row) {
            const int32_t kind = request.row_kinds[row];
            if (kind != CHRONOS_ROW_TARGET && kind != CHRONOS_ROW_COVARIATE)
                refuse("row_kinds[", row, "] is ", kind, "; it must be CHRONOS_ROW_* (0 or 1)");
        }
    }
    const int64_t targets = target_count(request);
    if (targets == 0) refuse("all ", request.row_count, " rows are covariates; at least one must be a target");
    if (request.constrain_ohlc && targets % 4 != 0)
        refuse("constrain_ohlc is set and there are ", targets, " targets; they must come in fours: open, high, low, close");
    const int64_t unknown = first_row(request.row_count, [&](int64_t row) {
        const float* end = request.context + request.context_offsets[row + 1];
        return is_target(request, row) &&
               std::all_of(end - steps_read(request, row), end, [](float value) { return std::isnan(value); });
    });
    if (unknown >= 0) {
        refuse("row ", unknown, " has no value in its last ", steps_read(request, unknown),
               " steps, all are NaN; a target needs at least one");
    }
    if (!request.future) return;
    const int64_t horizon = request.prediction_length;
    const int64_t boundless = first_row(request.row_count, [&](int64_t row) {
        return std::any_of(request.future + row * horizon, request.future + (row + 1) * horizon,
                           [](float v) { return std::isinf(v); });
    });
    if (boundless >= 0)
        refuse("future of row ", boundless, " is infinite; values must be finite, or NaN where they are not known");
}

std::vector<double> Engine::levels(const ChronosRequest& request) const {
    const std::vector<double>& native = model_->config().quantiles;
    if (request.level_count == 0) return native;
    std::vector<double> levels(request.quantile_levels, request.quantile_levels + request.level_count);
    for (double& level : levels) {
        const auto same = std::find_if(native.begin(), native.end(), [&](double known) { return same_level(known, level); });
        if (same != native.end()) level = *same;
    }
    return levels;
}

int64_t Engine::target_count(const ChronosRequest& request) {
    if (!request.row_kinds) return request.row_count;
    return std::count(request.row_kinds, request.row_kinds + request.row_count, CHRONOS_ROW_TARGET);
}

std::vector<int64_t> Engine::embedding_offsets(const ChronosRequest& request) const {
    std::vector<int64_t> offsets = {0};
    for (int64_t row = 0; row < request.row_count; ++row)
        offsets.push_back(offsets.back() + token_count_max(model_->config(), steps_read(request, row), 1));
    return offsets;
}

Engine::Batch Engine::arrange(const ChronosRequest& request) const {
    Batch batch;
    batch.rows.resize(static_cast<size_t>(request.row_count));
    std::iota(batch.rows.begin(), batch.rows.end(), 0);
    std::vector<Group> groups;
    if (request.group_ids) {
        // Groups by their first row; a group's rows in the order of the request.
        std::unordered_map<int64_t, int64_t> number;
        std::vector<int64_t> group_of(batch.rows.size());
        for (size_t row = 0; row < batch.rows.size(); ++row)
            group_of[row] = number.emplace(request.group_ids[row], static_cast<int64_t>(number.size())).first->second;
        std::stable_sort(batch.rows.begin(), batch.rows.end(), [&](int64_t a, int64_t b) {
            return group_of[static_cast<size_t>(a)] < group_of[static_cast<size_t>(b)];
        });
        for (int64_t row = 0; row < request.row_count; ++row) {
            const bool same = row > 0 && group_of[static_cast<size_t>(batch.rows[static_cast<size_t>(row)])] ==
                                             group_of[static_cast<size_t>(batch.rows[static_cast<size_t>(row - 1)])];
            if (same) {
                ++groups.back().row_count;
            } else {
                groups.push_back({row, 1});
            }
        }
    } else {
        for (int64_t row = 0; row < request.row_count; ++row) groups.push_back({row, 1});
    }

    std::vector<int64_t> tokens(groups.size());
    for (size_t i = 0; i < groups.size(); ++i)
        tokens[i] =
            group_tokens(groups[i], [&](int64_t row) { return steps_read(request, batch.rows[static_cast<size_t>(row)]); });
    // Rows of one length stand together, for devices that compute them as one batch.
    std::vector<int64_t> order(groups.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        const auto i = static_cast<size_t>(a), j = static_cast<size_t>(b);
        const bool alone_i = groups[i].row_count == 1, alone_j = groups[j].row_count == 1;
        return alone_i != alone_j ? alone_j : tokens[i] < tokens[j];
    });
    std::vector<int64_t> rows;
    rows.reserve(batch.rows.size());
    for (const int64_t i : order) {
        const Group& group = groups[static_cast<size_t>(i)];
        batch.groups.push_back({static_cast<int64_t>(rows.size()), group.row_count});
        batch.tokens.push_back(tokens[static_cast<size_t>(i)]);
        const auto begin = batch.rows.begin() + group.row_begin;
        rows.insert(rows.end(), begin, begin + group.row_count);
    }
    batch.rows = std::move(rows);
    return batch;
}

std::vector<Row> Engine::rows_of(const ChronosRequest& request, std::span<const int64_t> rows, int64_t horizon) const {
    std::vector<Row> out;
    for (const int64_t row : rows) {
        const int64_t steps = steps_read(request, row);
        const bool knows = request.future && horizon > 0;
        out.push_back({request.context + request.context_offsets[row + 1] - steps, steps,
                       knows ? request.future + row * horizon : nullptr, knows ? horizon : 0});
    }
    return out;
}

template <class Visit>
void Engine::in_chunks(const std::vector<Group>& groups, const std::vector<int64_t>& tokens, int64_t output_patches,
                       int64_t copies, Visit&& visit) const {
    int64_t budget = std::max<int64_t>(1, working_memory_bytes_ / model_->token_nbytes());
    if (model_->computes_rows()) budget = std::min(budget, RowPass::kTokensMax);
    for (size_t first = 0; first < groups.size();) {
        int64_t total = 0;
        size_t last = first;
        while (last < groups.size()) {
            const int64_t more = copies * (tokens[last] + groups[last].row_count * output_patches);
            if (last > first && total + more > budget) break;
            total += more;
            ++last;
        }
        // The kernel promises memory that it does not have and ends the process that uses it: so it is asked before.
        if (model_->placement().device.is_cpu() && total > budget) {
            const int64_t needed = total * model_->token_nbytes(), free = host_free_memory();
            if (needed > free) {
                fail(DIFFUSIONZ_E_OUT_OF_MEMORY, "a group of ", groups[first].row_count, " rows needs about ", needed >> 20,
                     " MiB at once; the host has ", free >> 20, " MiB free");
            }
        }
        const int64_t begin = groups[first].row_begin, end = groups[last - 1].row_begin + groups[last - 1].row_count;
        std::vector<Group> chunk(groups.begin() + static_cast<int64_t>(first), groups.begin() + static_cast<int64_t>(last));
        for (Group& group : chunk) group.row_begin -= begin;
        visit(begin, end, chunk);
        first = last;
    }
}

std::vector<float> Engine::predict(const std::vector<Row>& rows, const std::vector<Group>& groups, int64_t output_patches) {
    const ModelConfig& config = model_->config();
    if (row_pass_->takes(rows, groups, output_patches)) {
        row_pass_->submit(rows, output_patches);
        const float* quantiles = row_pass_->collect();
        return {quantiles,
                quantiles + rows.size() * config.quantiles.size() * static_cast<size_t>(output_patches * config.patch)};
    }
    const Tokens tokens = make_tokens(config, rows, groups, output_patches, model_->folds_single_groups());
    const at::Tensor scaled = model_->head(model_->encode(tokens, /*all=*/false)).cpu();
    const float* z = scaled.const_data_ptr<float>();
    const int64_t levels = static_cast<int64_t>(config.quantiles.size()), patch = config.patch, steps = output_patches * patch;
    std::vector<float> quantiles(rows.size() * static_cast<size_t>(levels * steps));
    at::parallel_for(0, static_cast<int64_t>(rows.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const Scale& scale = tokens.scales[static_cast<size_t>(row)];
            for (int64_t step = 0; step < steps; ++step) {
                const float* values = z + (row * output_patches + step / patch) * levels * patch + step % patch;
                for (int64_t level = 0; level < levels; ++level) {
                    const float value = values[level * patch];
                    quantiles[static_cast<size_t>((row * levels + level) * steps + step)] =
                        (config.arcsinh ? std::sinh(value) : value) * scale.scale + scale.loc;
                }
            }
        }
    });
    return quantiles;
}

std::vector<float> Engine::predict_unrolled(const std::vector<Row>& rows, const std::vector<Group>& groups,
                                            int64_t prediction_length, const Task& task) {
    const ModelConfig& config = model_->config();
    const auto patches_for = [&](int64_t steps) {
        return std::min((steps + config.patch - 1) / config.patch, config.max_output_patches);
    };
    int64_t patches = patches_for(prediction_length), steps = patches * config.patch;
    std::vector<float> quantiles = predict(rows, groups, patches);
    if (steps == prediction_length) return quantiles;

    const size_t series_count = rows.size() * config.quantiles.size();
    std::vector<float> all(series_count * static_cast<size_t>(prediction_length));
    const auto keep = [&](int64_t done) {
        for (size_t series = 0; series < series_count; ++series) {
            std::copy_n(quantiles.begin() + static_cast<int64_t>(series) * steps, std::min(steps, prediction_length - done),
                        all.begin() + static_cast<int64_t>(series) * prediction_length + done);
        }
    };
    keep(0);
    if (steps >= prediction_length) return all;

    Unrolling unrolling(config, rows, groups);
    for (int64_t done = steps; done < prediction_length; done += steps) {
        unrolling.extend(quantiles, steps);
        patches = patches_for(prediction_length - done), steps = patches * config.patch;
        const int64_t size = static_cast<int64_t>(config.quantiles.size()) * steps;
        std::vector<float> on_paths(unrolling.rows().size() * static_cast<size_t>(size));
        std::vector<int64_t> tokens;
        for (const Group& group : unrolling.groups())
            tokens.push_back(
                group_tokens(group, [&](int64_t row) { return unrolling.rows()[static_cast<size_t>(row)].context_length; }));
        in_chunks(unrolling.groups(), tokens, patches, 1, [&](int64_t begin, int64_t end, const std::vector<Group>& chunk) {
            task.check();
            const auto& path_rows = unrolling.rows();
            const std::vector<float> part = predict({path_rows.begin() + begin, path_rows.begin() + end}, chunk, patches);
            std::copy(part.begin(), part.end(), on_paths.begin() + begin * size);
        });
        quantiles = unrolling.mix(on_paths, steps);
        keep(done);
    }
    return all;
}

void Engine::forecast(const ChronosRequest& request, Task& task, float* out) {
    const CallQueue::Turn turn(queue_, &task);
    const c10::InferenceMode inference;
    const WorkStream::Scope stream(stream_);
    const Float32Products products(model_->placement().products == Products::tf32);
    task.enter(DIFFUSIONZ_STAGE_FORECAST);
    task.set_step_count(static_cast<int32_t>(request.row_count));
    const ModelConfig& config = model_->config();
    const int64_t horizon = request.prediction_length, native = static_cast<int64_t>(config.quantiles.size());
    const std::vector<double> wanted = levels(request);
    const int64_t level_count = static_cast<int64_t>(wanted.size());
    const Batch batch = arrange(request);

    // Where each target's forecast goes; covariates have none.
    std::vector<int64_t> place(static_cast<size_t>(request.row_count));
    int64_t targets = 0;
    for (int64_t row = 0; row < request.row_count; ++row)
        place[static_cast<size_t>(row)] = is_target(request, row) ? targets++ : -1;

    // Levels that the model has, as its own; empty when one has to be computed.
    std::vector<int64_t> own_levels;
    for (const double level : wanted) {
        const auto own = std::find(config.quantiles.begin(), config.quantiles.end(), level);
        if (own != config.quantiles.end()) own_levels.push_back(own - config.quantiles.begin());
    }
    if (request.monotone || own_levels.size() != wanted.size()) own_levels.clear();
    // From quantiles [rows, levels of the model, stride] of batch.rows[begin .. end) to what was asked for.
    const auto deliver = [&](int64_t begin, int64_t end, const float* quantiles, int64_t stride) {
        at::parallel_for(begin, end, 1, [&](int64_t from, int64_t to) {
            std::vector<float> values(static_cast<size_t>(native)), at_levels(wanted.size());
            for (int64_t i = from; i < to; ++i) {
                const int64_t target = place[static_cast<size_t>(batch.rows[static_cast<size_t>(i)])];
                if (target < 0) continue;
                const float* own = quantiles + (i - begin) * native * stride;
                float* result = out + target * level_count * horizon;
                if (!own_levels.empty()) {
                    for (const int64_t level : own_levels) result = std::copy_n(own + level * stride, horizon, result);
                    continue;
                }
                for (int64_t step = 0; step < horizon; ++step) {
                    for (int64_t level = 0; level < native; ++level)
                        values[static_cast<size_t>(level)] = own[level * stride + step];
                    // Rearrangement (Chernozhukov et al. 2010): sorted quantiles are never further from the true ones.
                    if (request.monotone) std::sort(values.begin(), values.end(), nan_last);
                    interpolate_quantiles(config.quantiles, values.data(), wanted, at_levels.data());
                    for (int64_t level = 0; level < level_count; ++level)
                        result[level * horizon + step] = at_levels[static_cast<size_t>(level)];
                }
            }
        });
        task.add_steps(static_cast<int32_t>(end - begin));
    };

    const int64_t first_patches = std::min((horizon + config.patch - 1) / config.patch, config.max_output_patches);
    const bool one_pass = horizon <= config.horizon();
    row_pass_->abandon();
    // A chunk that is on its way while the next one is made ready.
    std::optional<std::pair<int64_t, int64_t>> sent;
    const auto receive = [&] {
        if (sent) deliver(sent->first, sent->second, row_pass_->collect(), first_patches * config.patch);
        sent.reset();
    };
    in_chunks(batch.groups, batch.tokens, first_patches, one_pass ? 1 : Unrolling::kPaths,
              [&](int64_t begin, int64_t end, const std::vector<Group>& groups) {
                  task.check();
                  const std::vector<Row> rows = rows_of(request, {batch.rows.begin() + begin, batch.rows.begin() + end}, horizon);
                  if (one_pass && row_pass_->takes(rows, groups, first_patches)) {
                      row_pass_->submit(rows, first_patches);
                      receive();
                      sent.emplace(begin, end);
                      return;
                  }
                  receive();
                  deliver(begin, end, predict_unrolled(rows, groups, horizon, task).data(), horizon);
              });
    receive();
    if (!request.constrain_ohlc) return;
    const int64_t size = level_count * horizon;
    for (int64_t candle = 0; candle < targets / 4; ++candle) {
        float *open = out + candle * 4 * size, *high = open + size, *low = high + size, *close = low + size;
        for (int64_t i = 0; i < size; ++i) {
            const auto [least, most] = std::minmax({open[i], high[i], low[i], close[i]});
            high[i] = most;
            low[i] = least;
        }
    }
}

void Engine::embed(const ChronosRequest& request, Task& task, float* values, float* loc, float* scale) {
    const CallQueue::Turn turn(queue_, &task);
    const c10::InferenceMode inference;
    const WorkStream::Scope stream(stream_);
    const Float32Products products(model_->placement().products == Products::tf32);
    task.enter(DIFFUSIONZ_STAGE_FORECAST);
    task.set_step_count(static_cast<int32_t>(request.row_count));
    const ModelConfig& config = model_->config();
    const std::vector<int64_t> offsets = embedding_offsets(request);
    std::fill_n(values, offsets.back() * config.d_model, NAN);  // patches without an observation have no token
    const Batch batch = arrange(request);
    in_chunks(batch.groups, batch.tokens, 1, 1, [&](int64_t begin, int64_t end, const std::vector<Group>& groups) {
        task.check();
        const std::vector<Row> rows = rows_of(request, {batch.rows.begin() + begin, batch.rows.begin() + end}, 0);
        const Tokens tokens = make_tokens(config, rows, groups, 1, model_->folds_single_groups());
        const at::Tensor hidden = model_->encode(tokens, /*all=*/true).cpu();
        const float* states = hidden.const_data_ptr<float>();
        const int64_t* positions = tokens.positions.const_data_ptr<int64_t>();
        for (int64_t i = begin; i < end; ++i) {
            const auto r = static_cast<size_t>(i - begin);
            const int64_t row = batch.rows[static_cast<size_t>(i)];
            loc[row] = tokens.scales[r].loc;
            scale[row] = tokens.scales[r].scale;
            for (int64_t token = tokens.row_begin[r]; token < tokens.row_begin[r + 1]; ++token) {
                std::copy_n(states + token * config.d_model, config.d_model,
                            values + (offsets[static_cast<size_t>(row)] + positions[token]) * config.d_model);
            }
        }
        task.add_steps(static_cast<int32_t>(end - begin));
    });
}

std::string Engine::info() const {
    const ModelConfig& config = model_->config();
    nlohmann::ordered_json json;
    json["family"] = "chronos2";
    json["path"] = model_->folders().model.string();
    if (!model_->folders().lora.empty()) json["lora"] = model_->folders().lora.string();
    json["device"] = model_->placement().device.str();
    json["precision"] = precision_name(model_->placement());
    json["parameters"] = model_->parameter_count();
    json["d_model"] = config.d_model;
    json["layers"] = config.layers;
    json["context_length"] = config.context_length;
    json["patch_size"] = config.patch;
    json["prediction_length"] = config.horizon();
    json["quantile_levels"] = config.quantiles;
    json["working_memory_bytes"] = working_memory_bytes_;
    return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace diffusionz::chronos
