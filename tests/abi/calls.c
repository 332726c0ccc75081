/* calls MODEL N: loads a model, draws N pictures in ways that succeed and fail, frees everything. For leak checkers. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <diffusionz_c_api.h>

static int expect(int32_t status, int32_t expected, const char *what) {
    if (status == expected) return 0;
    fprintf(stderr, "%s: %s (%s), expected %s\n", what, diffusionz_status_name(status), diffusionz_last_error(),
            diffusionz_status_name(expected));
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    int wrong = 0;
    DiffusionZContext *ctx = diffusionz_init(argv[1], -1);
    if (!ctx) { fprintf(stderr, "%s\n", diffusionz_last_error()); return 1; }
    for (int i = 0; i < atoi(argv[2]); ++i) {
        DiffusionZRequest request;
        diffusionz_request_init(&request);
        request.prompt = "a red circle";
        request.negative_prompt = "blue";
        request.width = request.height = 32;
        request.num_steps = 1;
        request.guidance_scale = 2;
        DiffusionZResult result;
        DiffusionZTask *task = diffusionz_task_new();
        wrong |= expect(diffusionz_generate_batch(ctx, &request, 1, task, &result), DIFFUSIONZ_OK, "generate");
        DiffusionZProgress progress;
        progress.struct_size = sizeof progress;
        wrong |= expect(diffusionz_task_progress(task, &progress), DIFFUSIONZ_OK, "progress");
        diffusionz_task_free(task);

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
        if (diffusionz_init("/nonexistent", -1)) wrong = 1;
    }
    diffusionz_free(ctx);
    return wrong;
}
