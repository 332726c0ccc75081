/* hammer MODEL: eight threads use one context at once, well and badly. Each answer must be the one that the thread's variant
 * gets alone, each error must be the thread's own, and each cancelled task must end its call. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include FAMILY

enum { kThreads = 8, kRounds = 6 };

static Context *ctx;
static Answer alone[kThreads];

static const char *failure(int thread, int round) {
    Answer answer;
    if (ask(ctx, thread, &answer)) return diffusionz_last_error();
    if (!same(&answer, &alone[thread])) return "the answer is not the one that the variant gets alone";
    free_answer(&answer);

    char text[16];
    const int number = 1000001 + 100 * thread + 2 * round;
    snprintf(text, sizeof text, "%d", number);
    if (ask_wrongly(ctx, number, &answer) != DIFFUSIONZ_E_ARGUMENT) return "a bad number was taken";
    if (!strstr(diffusionz_last_error(), text)) return "the last error is another thread's";
    free_answer(&answer);

    DiffusionZTask *task = diffusionz_task_new();
    diffusionz_task_cancel(task);
    const int32_t status = ask_much(ctx, thread, task, &answer);
    diffusionz_task_free(task);
    free_answer(&answer);
    return status == DIFFUSIONZ_E_CANCELLED ? NULL : "a cancelled task was worked off";
}

static void *hammer(void *argument) {
    const int thread = *(const int *)argument;
    for (int round = 0; round < kRounds; ++round) {
        const char *what = failure(thread, round);
        if (what) {
            fprintf(stderr, "thread %d, round %d: %s\n", thread, round, what);
            return argument;
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 2) return 2;
    ctx = load(argv[1]);
    if (!ctx) { fprintf(stderr, "%s\n", diffusionz_last_error()); return 1; }
    int numbers[kThreads], wrong = 0;
    pthread_t threads[kThreads];
    for (int i = 0; i < kThreads; ++i) {
        wrong |= ask(ctx, i, &alone[i]) != DIFFUSIONZ_OK;
    }
    for (int i = 0; i < kThreads; ++i) {
        numbers[i] = i;
        if (pthread_create(&threads[i], NULL, hammer, &numbers[i])) return 1;
    }
    for (int i = 0; i < kThreads; ++i) {
        void *failed = NULL;
        pthread_join(threads[i], &failed);
        wrong |= failed != NULL;
        free_answer(&alone[i]);
    }
    unload(ctx);
    return wrong;
}
