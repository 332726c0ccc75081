/* calls MODEL: under valgrind, loads a model, calls it in ways that succeed and fail, and prints after one round of calls and
 * after three how many bytes are lost and how many are held: "LOST HELD". */
#include <stdio.h>
#include <valgrind/memcheck.h>

#include FAMILY

static int expect(int32_t status, int32_t expected, const char *what) {
    if (status == expected) return 0;
    fprintf(stderr, "%s: %s (%s), expected %s\n", what, diffusionz_status_name(status), diffusionz_last_error(),
            diffusionz_status_name(expected));
    return 1;
}

static void print_leaks(void) {
    unsigned long lost = 0, possibly = 0, reachable = 0, suppressed = 0;
    VALGRIND_DO_LEAK_CHECK;
    VALGRIND_COUNT_LEAKS(lost, possibly, reachable, suppressed);
    printf("%lu %lu\n", lost, possibly + reachable + suppressed);
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    setvbuf(stdout, NULL, _IONBF, 0); /* its buffer would be held */
    int wrong = 0;
    for (int round = 1; round <= 3; ++round) {
        Context *ctx = load(argv[1]);
        if (!ctx) { fprintf(stderr, "%s\n", diffusionz_last_error()); return 1; }
        wrong |= call_everything(ctx, expect);
        unload(ctx);
        if (round != 2) print_leaks();
    }
    return wrong;
}
