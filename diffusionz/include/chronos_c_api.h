/* diffusionz: Chronos-2, time-series forecasting, as a C library. Sibling of diffusionz_c_api.h, which it stands on.
 *
 *     #include <chronos_c_api.h>
 *     #include <stdio.h>
 *
 *     int main(int argc, char **argv) {
 *         if (argc != 2) { fprintf(stderr, "usage: %s MODEL_FOLDER < NUMBERS\n", argv[0]); return 2; }
 *         float series[8192];
 *         int64_t offsets[2] = {0, 0};
 *         while (offsets[1] < 8192 && scanf("%f", &series[offsets[1]]) == 1) ++offsets[1];
 *         ChronosContext *ctx = chronos_init(argv[1], -1);
 *         if (!ctx) { fprintf(stderr, "%s\n", diffusionz_last_error()); return 1; }
 *         const double levels[3] = {0.1, 0.5, 0.9};
 *         ChronosRequest request;
 *         chronos_request_init(&request);
 *         request.row_count = 1;
 *         request.context = series;
 *         request.context_offsets = offsets;
 *         request.prediction_length = 16;
 *         request.quantile_levels = levels;
 *         request.level_count = 3;
 *         ChronosForecast forecast;
 *         int32_t status = chronos_forecast(ctx, &request, NULL, &forecast);
 *         if (status) fprintf(stderr, "%s\n", diffusionz_last_error());
 *         const float *q = forecast.quantiles; // [1, 3, 16]
 *         for (int step = 0; !status && step < 16; ++step) printf("%g %g %g\n", q[step], q[16 + step], q[32 + step]);
 *         chronos_free_forecast(&forecast);
 *         chronos_free(ctx);
 *         return status ? 1 : 0;
 *     }
 *
 * A row is one series: a target to forecast, or a covariate that informs the targets of its group. Rows that share a group
 *   id attend to each other; without group ids each row stands alone. NaN is a value that is missing, anywhere.
 * Ownership. A context is freed with chronos_free, the memory inside a forecast or an embedding with chronos_free_forecast
 *   and chronos_free_embedding. Nothing that a caller passes in is kept after the call.
 * Threads, errors, growth: as in diffusionz_c_api.h, whose statuses, last error, tasks and devices serve here too. A task's
 *   steps are rows here.
 * Reference: Chronos-2 (Ansari et al. 2025, arXiv 2510.15821) as in chronos-forecasting 2.3.2. On the CPU a row's numbers
 *   depend on its group's rows in their order alone, bit for bit: not on the other rows of the call, nor on the number of threads.
 */
#ifndef CHRONOS_C_API_H
#define CHRONOS_C_API_H

#include "diffusionz_c_api.h"

#ifdef __cplusplus
extern "C" {
#endif
/* cdef: begin. The Python binding is generated from the lines between these two marks; there is no second copy. */

/* What a row is. */
enum {
    CHRONOS_ROW_TARGET = 0,   /* forecast */
    CHRONOS_ROW_COVARIATE = 1 /* only informs its group; nothing is returned for it */
};

/* A loaded model on a device, with its queue. */
typedef struct ChronosContext ChronosContext;

/* How to load a model. */
typedef struct {
    uint32_t struct_size;         /* set by chronos_init_options_init */
    int32_t device_id;            /* -1 the CPU (default), else a CUDA device's index */
    int32_t precision;            /* DIFFUSIONZ_PRECISION_* of the encoder's matrix products; all else is float32. AUTO: float32 (default) */
    int32_t num_threads;          /* CPU threads of the whole process; 0 leaves them as they are (default) */
    const char *lora_path;        /* folder of an adapter of upstream's fit (PEFT), merged into the weights; default NULL */
    int64_t working_memory_bytes; /* budget of a call beside its input and result; a group that needs more gets it; 0 picks one (default) */
} ChronosInitOptions;

/* Rows to forecast. */
typedef struct {
    uint32_t struct_size;           /* set by chronos_request_init */
    int32_t level_count;            /* of quantile_levels; 0 for the model's own (default) */
    int64_t row_count;              /* at least 1 */
    const float *context;           /* the rows' observations up to now, one row after the other; NaN is missing, infinity is refused */
    const int64_t *context_offsets; /* [row_count + 1], ascending from 0: row i is context[context_offsets[i] .. context_offsets[i + 1] - 1]; at
                                       least one value; more than the model's context length are read from the end */
    const int64_t *group_ids;       /* [row_count]: rows of one id attend to each other, wherever they stand; NULL: each alone (default) */
    const int32_t *row_kinds;       /* [row_count] of CHRONOS_ROW_*; NULL: all targets (default) */
    const float *future;            /* [row_count, prediction_length]: values known in advance, NaN where not; NULL: none are (default) */
    const double *quantile_levels;  /* [level_count], ascending, each over 0 and under 1; levels that the model has, within 1e-6, are as it gives them, others
                                       are interpolated linearly and end at the model's outermost */
    int64_t prediction_length;      /* steps, 1..1048576; past the model's own horizon it is unrolled over nine quantile paths, as upstream does */
    int32_t context_length;         /* steps of history to read, at most the model's; 0 for the model's (default) */
    int32_t monotone;               /* 1 sorts each step's quantiles, so that they never cross; default 0, as upstream */
    int32_t constrain_ohlc;         /* 1: the targets come in fours, open, high, low, close: at each step and level, high becomes the four's
                                       maximum and low their minimum; default 0 */
    int32_t reserved;               /* 0 */
} ChronosRequest;

/* Forecasts of the targets, in the order of their rows. */
typedef struct {
    float *quantiles;          /* [target_count, level_count, prediction_length]; NULL on failure */
    double *quantile_levels;   /* [level_count] */
    int64_t target_count;
    int64_t prediction_length; /* steps */
    int32_t level_count;
    int32_t median_index;      /* of the level 0.5; -1 when it was not asked for */
} ChronosForecast;

/* The encoder's last hidden states. */
typedef struct {
    float *values;          /* [token_offsets[row_count], width]; a row's tokens are its context patches, the register token when the model has
                               one, and the first future patch; NaN for patches without an observation. NULL on failure */
    int64_t *token_offsets; /* [row_count + 1] */
    float *loc;             /* [row_count]: mean of the row's observations */
    float *scale;           /* [row_count]: their standard deviation */
    int64_t row_count;
    int32_t width;          /* the model's d_model */
    int32_t reserved;
} ChronosEmbedding;

/* --- Context ------------------------------------------------------------------------------------------------ */

/* Loads a model at default options. `model_path` is a folder in upstream's format (config.json, model.safetensors), or of an adapter
 * that names such a folder as its base. `device_id` -1 is the CPU. NULL on failure: diffusionz_last_error() says why.
 * Some possible errors: E_MODEL, E_LORA, E_DEVICE, E_OUT_OF_MEMORY. */
DIFFUSIONZ_API ChronosContext *chronos_init(const char *model_path, int32_t device_id);

DIFFUSIONZ_API void chronos_init_options_init(ChronosInitOptions *options);

/* chronos_init with options; `*out` is NULL on failure. E_ARGUMENT also for an unknown struct_size. */
DIFFUSIONZ_API int32_t chronos_init_with_options(const char *model_path, const ChronosInitOptions *options, ChronosContext **out);

/* Waits for the calls that run or queue on the context, then frees it. No call may be made with it afterwards. NULL is fine. */
DIFFUSIONZ_API void chronos_free(ChronosContext *ctx);

/* What the model is, as JSON: family, path, device, precision, parameters, context length, horizon of one pass, quantile levels. Borrowed;
 * valid as long as the context. NULL for a NULL context. */
DIFFUSIONZ_API const char *chronos_model_info(const ChronosContext *ctx);

/* E_ARGUMENT. */
DIFFUSIONZ_API int32_t chronos_memory_info(ChronosContext *ctx, DiffusionZMemoryInfo *info);

/* --- Forecasting -------------------------------------------------------------------------------------------- */

DIFFUSIONZ_API void chronos_request_init(ChronosRequest *request);

/* Forecasts every target of `request` and fills `*out`, which is empty on failure; free it with chronos_free_forecast either way. The
 * whole request is checked before the first row is computed. `task` may be NULL; its steps are rows. E_ARGUMENT, E_CANCELLED, E_OUT_OF_MEMORY, E_DEVICE. */
DIFFUSIONZ_API int32_t chronos_forecast(ChronosContext *ctx, const ChronosRequest *request, DiffusionZTask *task, ChronosForecast *out);

/* Frees what a forecast holds and empties it; a second call and NULL are fine. */
DIFFUSIONZ_API void chronos_free_forecast(ChronosForecast *forecast);

/* Embeds every row of `request`, targets and covariates; only context, context_offsets, group_ids and context_length are read. E_ARGUMENT, E_CANCELLED,
 * E_OUT_OF_MEMORY, E_DEVICE. Free `*out` with chronos_free_embedding either way. */
DIFFUSIONZ_API int32_t chronos_embed(ChronosContext *ctx, const ChronosRequest *request, DiffusionZTask *task, ChronosEmbedding *out);

/* Frees what an embedding holds and empties it; a second call and NULL are fine. */
DIFFUSIONZ_API void chronos_free_embedding(ChronosEmbedding *embedding);

/* cdef: end */
#ifdef __cplusplus
}
#endif
#endif /* CHRONOS_C_API_H */
