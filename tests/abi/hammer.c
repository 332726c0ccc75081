/* hammer MODEL: eight threads use one context at once, well and badly. Each picture must be the one that its seed draws
 * alone, each error must be the thread's own, and each cancelled task must end its call. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include <diffusionz_c_api.h>

enum { kThreads = 8, kRounds = 6 };

static DiffusionZContext *ctx;
static DiffusionZResult alone[kThreads];

static void request_for(int thread, DiffusionZRequest *request) {
    diffusionz_request_init(request);
    request->prompt = thread % 2 ? "a red circle" : "two blue squares";
    request->width = 16 * (1 + thread % 3);
    request->height = 32;
    request->num_steps = 1 + thread % 2;
    request->seed = thread;
    request->format = DIFFUSIONZ_FORMAT_RGB;
}

static const char *failure(int thread, int round) {
    DiffusionZRequest request;
    DiffusionZResult result;
    request_for(thread, &request);
    if (diffusionz_generate_batch(ctx, &request, 1, NULL, &result)) return diffusionz_last_error();
    if (result.image_len != alone[thread].image_len || memcmp(result.image_data, alone[thread].image_data, (size_t)result.image_len)) {
        return "the picture is not the one that the seed draws alone";
    }
    diffusionz_free_result(&result);

    char width[16];
    request.width = 1000001 + 100 * thread + 2 * round;
    snprintf(width, sizeof width, "%d", request.width);
    if (diffusionz_generate_batch(ctx, &request, 1, NULL, &result) != DIFFUSIONZ_E_ARGUMENT) return "a bad width was taken";
    if (!strstr(diffusionz_last_error(), width)) return "the last error is another thread's";
    if (!strstr(result.error_msg, width)) return "the message is another thread's";
    diffusionz_free_result(&result);

    request_for(thread, &request);
    request.num_steps = 1000;
    DiffusionZTask *task = diffusionz_task_new();
    diffusionz_task_cancel(task);
    const int32_t status = diffusionz_generate_batch(ctx, &request, 1, task, &result);
    diffusionz_task_free(task);
    diffusionz_free_result(&result);
    return status == DIFFUSIONZ_E_CANCELLED ? NULL : "a cancelled task drew";
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
    ctx = diffusionz_init(argv[1], -1);
    if (!ctx) { fprintf(stderr, "%s\n", diffusionz_last_error()); return 1; }
    int numbers[kThreads], wrong = 0;
    pthread_t threads[kThreads];
    for (int i = 0; i < kThreads; ++i) {
        DiffusionZRequest request;
        request_for(i, &request);
        wrong |= diffusionz_generate_batch(ctx, &request, 1, NULL, &alone[i]) != DIFFUSIONZ_OK;
    }
    for (int i = 0; i < kThreads; ++i) {
        numbers[i] = i;
        if (pthread_create(&threads[i], NULL, hammer, &numbers[i])) return 1;
    }
    for (int i = 0; i < kThreads; ++i) {
        void *failed = NULL;
        pthread_join(threads[i], &failed);
        wrong |= failed != NULL;
        diffusionz_free_result(&alone[i]);
    }
    diffusionz_free(ctx);
    return wrong;
}
