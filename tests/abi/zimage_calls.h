/* What hammer.c, cycles.c and calls.c need to know of a family: Z-Image. chronos_calls.h is its counterpart. */
#include <stdlib.h>
#include <string.h>

#include <diffusionz_c_api.h>

typedef DiffusionZContext Context;
typedef DiffusionZResult Answer;

static inline Context *load(const char *path) { return diffusionz_init(path, -1); }
static inline void unload(Context *ctx) { diffusionz_free(ctx); }
static inline void free_answer(Answer *answer) { diffusionz_free_result(answer); }

static inline void request_for(int variant, DiffusionZRequest *request) {
    diffusionz_request_init(request);
    request->prompt = variant % 2 ? "a red circle" : "two blue squares";
    request->width = 16 * (1 + variant % 3);
    request->height = 32;
    request->num_steps = 1 + variant % 2;
    request->seed = variant;
    request->format = DIFFUSIONZ_FORMAT_RGB;
}

/* Whether the task has the one preview that a picture of two steps gives. */
static inline int has_preview(DiffusionZTask *task, const DiffusionZRequest *request) {
    DiffusionZPreview preview;
    preview.struct_size = sizeof preview;
    int right = !diffusionz_task_take_preview(task, &preview) && preview.rgb && preview.step == 1 &&
                preview.width == request->width / 2 && preview.height == request->height / 2;
    diffusionz_free_preview(&preview);
    right &= !preview.rgb && !diffusionz_task_take_preview(task, &preview) && !preview.rgb; /* there was one */
    diffusionz_free_preview(&preview);
    return right;
}

/* An answer that depends on `variant` alone. Pictures of two steps have a preview, which every other caller leaves where it is. */
static inline int32_t ask(Context *ctx, int variant, Answer *answer) {
    DiffusionZRequest request;
    request_for(variant, &request);
    DiffusionZTask *task = diffusionz_task_new();
    int32_t status = diffusionz_task_keep_previews(task, 3);
    if (!status) status = diffusionz_generate_batch(ctx, &request, 1, task, answer);
    if (!status && variant % 4 == 1 && !has_preview(task, &request)) status = DIFFUSIONZ_E_INTERNAL;
    diffusionz_task_free(task);
    return status;
}

static inline int same(const Answer *a, const Answer *b) {
    return a->image_len == b->image_len && !memcmp(a->image_data, b->image_data, (size_t)a->image_len);
}

/* An argument error whose message holds the odd `number`. */
static inline int32_t ask_wrongly(Context *ctx, int number, Answer *answer) {
    DiffusionZRequest request;
    request_for(0, &request);
    request.width = number;
    const int32_t status = diffusionz_generate_batch(ctx, &request, 1, NULL, answer);
    return strcmp(answer->error_msg, diffusionz_last_error()) ? -1 : status;
}

/* More work than a test has time for. */
static inline int32_t ask_much(Context *ctx, int variant, DiffusionZTask *task, Answer *answer) {
    DiffusionZRequest request;
    request_for(variant, &request);
    request.num_steps = 1000;
    return diffusionz_generate_batch(ctx, &request, 1, task, answer);
}

/* Statuses that differ from what is expected, of calls of every kind. */
static inline int call_everything(Context *ctx, int (*expect)(int32_t status, int32_t expected, const char *what)) {
    DiffusionZRequest request;
    diffusionz_request_init(&request);
    request.prompt = "a red circle";
    request.negative_prompt = "blue";
    request.width = request.height = 32;
    request.num_steps = 1;
    request.guidance_scale = 2;
    DiffusionZResult result;
    DiffusionZTask *task = diffusionz_task_new();
    int wrong = expect(diffusionz_generate_batch(ctx, &request, 1, task, &result), DIFFUSIONZ_OK, "generate");
    DiffusionZProgress progress;
    progress.struct_size = sizeof progress;
    wrong |= expect(diffusionz_task_progress(task, &progress), DIFFUSIONZ_OK, "progress");
    diffusionz_task_free(task);

    DiffusionZResult result_of_two;
    request.num_steps = 2;
    for (int taken = 0; taken < 2; ++taken) { /* a preview that nobody takes goes with its task */
        task = diffusionz_task_new();
        wrong |= expect(diffusionz_task_keep_previews(task, 1), DIFFUSIONZ_OK, "keep_previews");
        wrong |= expect(diffusionz_generate_batch(ctx, &request, 1, task, &result_of_two), DIFFUSIONZ_OK, "with a preview");
        diffusionz_free_result(&result_of_two);
        if (taken && !has_preview(task, &request)) wrong |= expect(DIFFUSIONZ_E_INTERNAL, DIFFUSIONZ_OK, "take_preview");
        diffusionz_task_free(task);
    }
    request.num_steps = 1;

    char *metadata = NULL;
    wrong |= expect(diffusionz_image_metadata(result.image_data, result.image_len, &metadata), DIFFUSIONZ_OK, "metadata");
    DiffusionZResult decoded, encoded;
    wrong |= expect(diffusionz_image_decode(result.image_data, result.image_len, &decoded), DIFFUSIONZ_OK, "decode");
    wrong |= expect(diffusionz_image_encode(decoded.image_data, 32, 32, DIFFUSIONZ_FORMAT_PNG, 90, metadata, &encoded),
                    DIFFUSIONZ_OK, "encode");
    diffusionz_free_result(&result);
    wrong |= expect(diffusionz_image_decode(encoded.image_data, 20, &result), DIFFUSIONZ_E_IMAGE, "a cut PNG");
    diffusionz_free_string(metadata);
    diffusionz_free_result(&decoded);
    diffusionz_free_result(&encoded);
    diffusionz_free_result(&result);
    diffusionz_free_result(&result);

    request.width = 17;
    wrong |= expect(diffusionz_generate_batch(ctx, &request, 1, NULL, &result), DIFFUSIONZ_E_ARGUMENT, "width 17");
    diffusionz_free_result(&result);
    wrong |= expect(diffusionz_load_lora(ctx, "/nonexistent.safetensors", 1), DIFFUSIONZ_E_LORA, "no LoRA");
    return wrong | (load("/nonexistent") != NULL);
}
