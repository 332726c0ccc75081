// The exports of chronos_c_api.h: each checks its pointers, calls the engine inside guard(), and hands out memory.

#include "chronos_c_api.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "c_api/arguments.h"
#include "c_api/guard.h"
#include "chronos/engine.h"
#include "chronos/quantiles.h"
#include "core/device.h"
#include "core/threads.h"

using namespace diffusionz;

struct ChronosContext {
    ChronosContext(const char* path, const char* lora, Placement placement, int64_t working_memory_bytes)
        : engine(path, lora ? lora : "", placement, working_memory_bytes), info(engine.info()) {}
    chronos::Engine engine;
    std::string info;
    ContextUse use;
};

namespace {

// Memory that a _free function returns. The kernel promises more than it has and ends the process that uses it: so it is asked
// before.
template <class Value>
Value* allocate(int64_t count) {
    const auto needed = static_cast<double>(count) * sizeof(Value);
    const int64_t free = host_free_memory();
    if (needed > static_cast<double>(free)) {
        fail(DIFFUSIONZ_E_OUT_OF_MEMORY, "the result has ", static_cast<int64_t>(needed / (1 << 20)), " MiB; the host has ",
             free >> 20, " MiB free");
    }
    auto* values = static_cast<Value*>(std::malloc(std::max<size_t>(1, static_cast<size_t>(count) * sizeof(Value))));
    if (!values) throw std::bad_alloc();
    return values;
}

template <class Value>
Value* copied(const std::vector<Value>& values) {
    Value* copy = allocate<Value>(static_cast<int64_t>(values.size()));
    std::copy(values.begin(), values.end(), copy);
    return copy;
}

}  // namespace

extern "C" {

ChronosContext* chronos_init(const char* model_path, int32_t device_id) {
    ChronosInitOptions options;
    chronos_init_options_init(&options);
    options.device_id = device_id;
    ChronosContext* ctx = nullptr;
    chronos_init_with_options(model_path, &options, &ctx);
    return ctx;
}

void chronos_init_options_init(ChronosInitOptions* options) {
    if (!options) return;
    *options = {};
    options->struct_size = sizeof *options;
    options->device_id = -1;
}

int32_t chronos_init_with_options(const char* model_path, const ChronosInitOptions* options, ChronosContext** out) {
    if (out) *out = nullptr;
    return guard([&] {
        if (!model_path) fail(DIFFUSIONZ_E_ARGUMENT, "model_path is NULL");
        if (!out) fail(DIFFUSIONZ_E_ARGUMENT, "out is NULL");
        check_size("options", options);
        const Placement placement = placement_of(options->device_id, options->precision, Family::chronos);
        want_threads(options->num_threads);
        *out = new ChronosContext(model_path, options->lora_path, placement, options->working_memory_bytes);
    });
}

void chronos_free(ChronosContext* ctx) {
    if (!ctx) return;
    guard([&] { ctx->use.wait(); });
    delete ctx;
}

const char* chronos_model_info(const ChronosContext* ctx) { return ctx ? ctx->info.c_str() : nullptr; }

int32_t chronos_memory_info(ChronosContext* ctx, DiffusionZMemoryInfo* info) {
    return guard([&] {
        const auto inside = enter_context(ctx);
        check_size("info", info);
        DiffusionZMemoryInfo memory{};  // an adapter is merged into the weights
        memory.shared_by = ctx->engine.shared_by();
        memory.weights_bytes = static_cast<int64_t>(ctx->engine.model().nbytes());
        add_device_memory(ctx->engine.model().placement().device, memory);
        write_struct(memory, info);
    });
}

void chronos_request_init(ChronosRequest* request) {
    if (!request) return;
    *request = {};
    request->struct_size = sizeof *request;
    request->prediction_length = 1;
}

int32_t chronos_forecast(ChronosContext* ctx, const ChronosRequest* request, DiffusionZTask* task, ChronosForecast* out) {
    if (out) *out = {};
    const int32_t status = guard([&] {
        Task own;  // for a caller that does not watch
        Task& watched = task ? task->task : own;
        const auto inside = enter_context(ctx);
        if (!out) fail(DIFFUSIONZ_E_ARGUMENT, "out is NULL");
        check_size("request", request);
        ctx->engine.check(*request, /*embed=*/false);
        watched.begin(0);
        apply_threads();
        const TaskEnd end(watched);
        const std::vector<double> levels = ctx->engine.levels(*request);
        const auto median =
            std::find_if(levels.begin(), levels.end(), [](double level) { return chronos::same_level(level, 0.5); });
        out->target_count = chronos::Engine::target_count(*request);
        out->prediction_length = request->prediction_length;
        out->level_count = static_cast<int32_t>(levels.size());
        out->median_index = median == levels.end() ? -1 : static_cast<int32_t>(median - levels.begin());
        out->quantile_levels = copied(levels);
        out->quantiles = allocate<float>(out->target_count * out->level_count * out->prediction_length);
        ctx->engine.forecast(*request, watched, out->quantiles);
    });
    if (status != DIFFUSIONZ_OK) chronos_free_forecast(out);
    return status;
}

void chronos_free_forecast(ChronosForecast* forecast) {
    if (!forecast) return;
    std::free(forecast->quantiles);
    std::free(forecast->quantile_levels);
    *forecast = {};
}

int32_t chronos_embed(ChronosContext* ctx, const ChronosRequest* request, DiffusionZTask* task, ChronosEmbedding* out) {
    if (out) *out = {};
    const int32_t status = guard([&] {
        Task own;
        Task& watched = task ? task->task : own;
        const auto inside = enter_context(ctx);
        if (!out) fail(DIFFUSIONZ_E_ARGUMENT, "out is NULL");
        check_size("request", request);
        ctx->engine.check(*request, /*embed=*/true);
        watched.begin(0);
        apply_threads();
        const TaskEnd end(watched);
        const std::vector<int64_t> offsets = ctx->engine.embedding_offsets(*request);
        const int64_t width = ctx->engine.model().config().d_model;
        out->row_count = request->row_count;
        out->width = static_cast<int32_t>(width);
        out->token_offsets = copied(offsets);
        out->loc = allocate<float>(request->row_count);
        out->scale = allocate<float>(request->row_count);
        out->values = allocate<float>(offsets.back() * width);
        ctx->engine.embed(*request, watched, out->values, out->loc, out->scale);
    });
    if (status != DIFFUSIONZ_OK) chronos_free_embedding(out);
    return status;
}

void chronos_free_embedding(ChronosEmbedding* embedding) {
    if (!embedding) return;
    std::free(embedding->values);
    std::free(embedding->token_offsets);
    std::free(embedding->loc);
    std::free(embedding->scale);
    *embedding = {};
}

}  // extern "C"
