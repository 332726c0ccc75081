/* cycles MODEL N: N times loads a model, draws with it and frees it. Prints the resident kibibytes after each tenth. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <diffusionz_c_api.h>

static long resident_kib(void) {
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%*s %ld", &pages) != 1) exit(3);
    fclose(file);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    const int count = atoi(argv[2]);
    for (int i = 1; i <= count; ++i) {
        DiffusionZContext *ctx = diffusionz_init(argv[1], -1);
        if (!ctx) { fprintf(stderr, "%s\n", diffusionz_last_error()); return 1; }
        DiffusionZParams params = {0};
        params.prompt = "x";
        params.width = params.height = 16;
        params.num_steps = 1;
        params.seed = i;
        DiffusionZResult result = diffusionz_generate(ctx, &params);
        if (result.error_code) { fprintf(stderr, "%s\n", result.error_msg); return 1; }
        diffusionz_free_result(&result);
        diffusionz_free(ctx);
        if (i % (count / 10) == 0) printf("%ld\n", resident_kib());
    }
    return 0;
}
