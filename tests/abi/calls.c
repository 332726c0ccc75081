/* calls MODEL N: loads a model, calls it N times in ways that succeed and fail, frees everything. For leak checkers. */
#include <stdio.h>

#include FAMILY

static int expect(int32_t status, int32_t expected, const char *what) {
    if (status == expected) return 0;
    fprintf(stderr, "%s: %s (%s), expected %s\n", what, diffusionz_status_name(status), diffusionz_last_error(),
            diffusionz_status_name(expected));
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    int wrong = 0;
    Context *ctx = load(argv[1]);
    if (!ctx) { fprintf(stderr, "%s\n", diffusionz_last_error()); return 1; }
    for (int i = 0; i < atoi(argv[2]); ++i) wrong |= call_everything(ctx, expect);
    unload(ctx);
    return wrong;
}
