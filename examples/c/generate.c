/* Draws one picture. This is the program of diffusionz_c_api.h's first screen, word for word.
 *
 *     export PKG_CONFIG_PATH=$(diffusionz info --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["pkgconfig_dir"])')
 *     cc generate.c -o generate $(pkg-config --cflags --libs diffusionz)
 *     ./generate MODEL_FOLDER "a red circle on a blue background" out.webp
 */
#include <diffusionz_c_api.h>
#include <stdio.h>

int main(int argc, char **argv) {
    if (argc != 4) { fprintf(stderr, "usage: %s MODEL_FOLDER PROMPT OUT.webp\n", argv[0]); return 2; }
    DiffusionZContext *ctx = diffusionz_init(argv[1], -1);
    if (!ctx) { fprintf(stderr, "%s\n", diffusionz_last_error()); return 1; }
    DiffusionZParams params = {0};
    params.prompt = argv[2];
    params.width = params.height = 256;
    params.num_steps = 8;
    params.seed = 7;
    DiffusionZResult result = diffusionz_generate(ctx, &params);
    if (result.error_code) fprintf(stderr, "%s\n", result.error_msg);
    FILE *file = result.error_code ? NULL : fopen(argv[3], "wb");
    int written = file && fwrite(result.image_data, 1, (size_t)result.image_len, file) == (size_t)result.image_len;
    if (file && fclose(file)) written = 0;
    if (!result.error_code && !written) perror(argv[3]);
    diffusionz_free_result(&result);
    diffusionz_free(ctx);
    return written ? 0 : 1;
}
