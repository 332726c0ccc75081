/* cycles MODEL N: N times loads a model, uses it and frees it. Prints the resident kibibytes after each tenth. */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include FAMILY

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
        Context *ctx = load(argv[1]);
        Answer answer;
        if (!ctx || ask(ctx, i, &answer)) { fprintf(stderr, "%s\n", diffusionz_last_error()); return 1; }
        free_answer(&answer);
        unload(ctx);
        if (i % (count / 10) == 0) printf("%ld\n", resident_kib());
    }
    return 0;
}
