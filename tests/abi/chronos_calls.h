/* What hammer.c, cycles.c and calls.c need to know of a family: Chronos-2. zimage_calls.h is its counterpart. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <chronos_c_api.h>

typedef ChronosContext Context;
typedef ChronosForecast Answer;

enum { kRows = 3, kSteps = 120 };

static inline Context *load(const char *path) { return chronos_init(path, -1); }
static inline void unload(Context *ctx) { chronos_free(ctx); }
static inline void free_answer(Answer *answer) { chronos_free_forecast(answer); }

/* Rows with a gap, two of them in one group. Lives as long as the calls that read it. */
typedef struct {
    float context[kRows * kSteps];
    int64_t offsets[kRows + 1], groups[kRows];
    ChronosRequest request;
} Rows;

static inline void rows_for(int variant, Rows *rows) {
    const int length = kSteps - 7 * (variant % 5);
    rows->offsets[0] = 0;
    for (int row = 0; row < kRows; ++row) {
        rows->offsets[row + 1] = rows->offsets[row] + length;
        rows->groups[row] = row == 1;
        for (int i = 0; i < length; ++i) {
            rows->context[rows->offsets[row] + i] = i / 20 == 1 ? NAN : (float)((i * (variant + row + 3)) % 17 + variant);
        }
    }
    chronos_request_init(&rows->request);
    rows->request.row_count = kRows;
    rows->request.context = rows->context;
    rows->request.context_offsets = rows->offsets;
    rows->request.group_ids = rows->groups;
    rows->request.prediction_length = 20 + variant % 3;
    rows->request.monotone = variant % 2;
}

/* An answer that depends on `variant` alone. */
static inline int32_t ask(Context *ctx, int variant, Answer *answer) {
    Rows rows;
    rows_for(variant, &rows);
    return chronos_forecast(ctx, &rows.request, NULL, answer);
}

static inline int same(const Answer *a, const Answer *b) {
    const size_t count = (size_t)(a->target_count * a->level_count * a->prediction_length);
    return a->target_count == b->target_count && a->level_count == b->level_count && a->prediction_length == b->prediction_length &&
           !memcmp(a->quantiles, b->quantiles, count * sizeof *a->quantiles);
}

/* An argument error whose message holds the odd `number`. */
static inline int32_t ask_wrongly(Context *ctx, int number, Answer *answer) {
    Rows rows;
    rows_for(0, &rows);
    rows.request.context_length = number;
    return chronos_forecast(ctx, &rows.request, NULL, answer);
}

/* More work than a test has time for. */
static inline int32_t ask_much(Context *ctx, int variant, DiffusionZTask *task, Answer *answer) {
    Rows rows;
    rows_for(variant, &rows);
    rows.request.prediction_length = 1000000;
    return chronos_forecast(ctx, &rows.request, task, answer);
}

/* Statuses that differ from what is expected, of calls of every kind. */
static inline int call_everything(Context *ctx, int (*expect)(int32_t status, int32_t expected, const char *what)) {
    Rows rows;
    ChronosForecast forecast;
    ChronosEmbedding embedding;
    DiffusionZTask *task = diffusionz_task_new();
    rows_for(1, &rows);
    int wrong = expect(chronos_forecast(ctx, &rows.request, task, &forecast), DIFFUSIONZ_OK, "forecast");
    DiffusionZProgress progress;
    progress.struct_size = sizeof progress;
    wrong |= expect(diffusionz_task_progress(task, &progress), DIFFUSIONZ_OK, "progress");
    wrong |= progress.step != kRows;
    chronos_free_forecast(&forecast);
    wrong |= expect(chronos_forecast(ctx, &rows.request, task, &forecast), DIFFUSIONZ_E_ARGUMENT, "a used task");
    diffusionz_task_free(task);

    /* Covariates known in advance, levels between the model's, and a horizon that a model of 40 steps a pass unrolls. */
    const int32_t kinds[kRows] = {CHRONOS_ROW_TARGET, CHRONOS_ROW_TARGET, CHRONOS_ROW_COVARIATE};
    const double levels[3] = {0.12, 0.5, 0.999};
    enum { kLong = 50 };
    float *future = malloc(sizeof *future * kRows * kLong);
    if (!future) return 1;
    for (int i = 0; i < kRows * kLong; ++i) future[i] = i < 2 * kLong ? NAN : (float)(i % 7);
    rows.request.row_kinds = kinds;
    rows.request.quantile_levels = levels;
    rows.request.level_count = 3;
    rows.request.future = future;
    rows.request.prediction_length = kLong;
    wrong |= expect(chronos_forecast(ctx, &rows.request, NULL, &forecast), DIFFUSIONZ_OK, "unrolled forecast");
    wrong |= forecast.target_count != 2 || forecast.median_index != 1;
    chronos_free_forecast(&forecast);
    chronos_free_forecast(&forecast);
    free(future);

    wrong |= expect(chronos_embed(ctx, &rows.request, NULL, &embedding), DIFFUSIONZ_OK, "embed");
    chronos_free_embedding(&embedding);
    chronos_free_embedding(&embedding);
    rows.context[3] = INFINITY;
    wrong |= expect(chronos_forecast(ctx, &rows.request, NULL, &forecast), DIFFUSIONZ_E_ARGUMENT, "infinity");
    wrong |= expect(chronos_embed(ctx, &rows.request, NULL, &embedding), DIFFUSIONZ_E_ARGUMENT, "infinity, embedded");
    task = diffusionz_task_new();
    diffusionz_task_cancel(task);
    rows_for(2, &rows);
    wrong |= expect(chronos_forecast(ctx, &rows.request, task, &forecast), DIFFUSIONZ_E_CANCELLED, "cancelled");
    diffusionz_task_free(task);

    ChronosInitOptions options;
    chronos_init_options_init(&options);
    options.lora_path = "/nonexistent";
    Context *other;
    wrong |= expect(chronos_init_with_options("/nonexistent", &options, &other), DIFFUSIONZ_E_LORA, "no adapter");
    return wrong | (load("/nonexistent") != NULL);
}
