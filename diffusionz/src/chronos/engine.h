// One context of the forecasting ABI: a shared model and its queue of calls.
#pragma once

#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "chronos/model.h"
#include "chronos/row_pass.h"
#include "chronos_c_api.h"
#include "core/call_queue.h"
#include "core/cuda_graph.h"

namespace diffusionz::chronos {

class Engine {
public:
    // `lora` may be empty. working_memory_bytes 0 picks a budget.
    Engine(const std::filesystem::path& path, const std::filesystem::path& lora, Placement placement,
           int64_t working_memory_bytes);

    // Fails with E_ARGUMENT, naming row and value. `embed`: only what chronos_embed reads is looked at.
    void check(const ChronosRequest& request, bool embed) const;

    // Of a checked request: the levels that it gets (the model's own where one is asked for within 1e-6), and the rows that are
    // forecast.
    std::vector<double> levels(const ChronosRequest& request) const;
    static int64_t target_count(const ChronosRequest& request);
    // Tokens of each row's embedding, as offsets [row_count + 1].
    std::vector<int64_t> embedding_offsets(const ChronosRequest& request) const;

    // Fills quantiles [targets, levels, prediction_length]. The request has passed check(). Fails with E_CANCELLED,
    // E_OUT_OF_MEMORY.
    void forecast(const ChronosRequest& request, Task& task, float* quantiles);
    // Fills values [embedding_offsets.back(), d_model], loc and scale [rows].
    void embed(const ChronosRequest& request, Task& task, float* values, float* loc, float* scale);

    const Model& model() const { return *model_; }
    int32_t shared_by() const { return static_cast<int32_t>(model_.use_count()); }
    // What the model is, as JSON.
    std::string info() const;

private:
    struct Batch;

    int64_t context_length(const ChronosRequest& request) const;
    // Steps of a row that are read.
    int64_t steps_read(const ChronosRequest& request, int64_t row) const;
    // Tokens of a group, without outputs.
    template <class StepsOf>
    int64_t group_tokens(const Group& group, StepsOf&& steps_of) const;
    // The request's groups, those of several rows first, then by length; rows by group.
    Batch arrange(const ChronosRequest& request) const;
    // What a pass reads of the request's `rows`; with horizon 0 nothing of their future.
    std::vector<Row> rows_of(const ChronosRequest& request, std::span<const int64_t> rows, int64_t horizon) const;
    // Calls visit(begin, end, chunk) for runs of groups, rows begin to end, whose tokens fit the budget with `copies` of each
    // row; `chunk` are the run's groups, counted from its begin. A group is never cut: one that is over the budget is a run of
    // its own. `tokens` are each group's, without outputs.
    template <class Visit>
    void in_chunks(const std::vector<Group>& groups, const std::vector<int64_t>& tokens, int64_t output_patches, int64_t copies,
                   Visit&& visit) const;
    // Quantiles of one pass, unscaled: [rows, quantiles, output_patches * patch].
    std::vector<float> predict(const std::vector<Row>& rows, const std::vector<Group>& groups, int64_t output_patches);
    // The same for any horizon: [rows, quantiles, prediction_length].
    std::vector<float> predict_unrolled(const std::vector<Row>& rows, const std::vector<Group>& groups, int64_t prediction_length,
                                        const Task& task);

    std::shared_ptr<const Model> model_;
    int64_t working_memory_bytes_;
    std::unique_ptr<RowPass> row_pass_;
    WorkStream stream_;
    CallQueue queue_;
};

}  // namespace diffusionz::chronos
