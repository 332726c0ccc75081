/* A program built when DiffusionZInitOptions and DiffusionZMemoryInfo were shorter: it has its own declarations of them, and guards
 * behind each that the library must not write to. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct DiffusionZContext DiffusionZContext;
typedef struct {
    uint32_t struct_size;
    int32_t device_id, precision, num_threads, cuda_graphs;
} Options;
typedef struct {
    uint32_t struct_size;
    int32_t shared_by;
    int64_t weights_bytes, lora_bytes;
} Memory;

const char *diffusionz_last_error(void);
void diffusionz_init_options_init(Options *options);
int32_t diffusionz_init_with_options(const char *model_path, const Options *options, DiffusionZContext **out);
int32_t diffusionz_memory_info(DiffusionZContext *ctx, Memory *info);
void diffusionz_free(DiffusionZContext *ctx);

int main(int argc, char **argv) {
    struct {
        Options options;
        unsigned char guard[64];
    } given;
    struct {
        Memory memory;
        unsigned char guard[64];
    } told;
    memset(&given, 0xA5, sizeof given);
    memset(&told, 0xA5, sizeof told);
    if (argc != 2) return 2;
    diffusionz_init_options_init(&given.options);
    if (given.options.struct_size != 20 || given.options.device_id != -1 || given.options.cuda_graphs != 1) return 3;
    DiffusionZContext *ctx = NULL;
    if (diffusionz_init_with_options(argv[1], &given.options, &ctx) != 0) {
        fprintf(stderr, "%s\n", diffusionz_last_error());
        return 4;
    }
    told.memory.struct_size = sizeof told.memory;
    if (diffusionz_memory_info(ctx, &told.memory) != 0) {
        fprintf(stderr, "%s\n", diffusionz_last_error());
        return 5;
    }
    if (told.memory.struct_size != 24 || told.memory.weights_bytes <= 0 || told.memory.shared_by != 1) return 6;
    for (size_t i = 0; i < 64; ++i) {
        if (given.guard[i] != 0xA5 || told.guard[i] != 0xA5) return 7;
    }
    diffusionz_free(ctx);
    return 0;
}
