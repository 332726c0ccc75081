/* diffusionz: Z-Image, text to image, as a C library.
 *
 *     #include <diffusionz_c_api.h>
 *     #include <stdio.h>
 *
 *     int main(int argc, char **argv) {
 *         if (argc != 4) { fprintf(stderr, "usage: %s MODEL_FOLDER PROMPT OUT.webp\n", argv[0]); return 2; }
 *         DiffusionZContext *ctx = diffusionz_init(argv[1], -1);
 *         if (!ctx) { fprintf(stderr, "%s\n", diffusionz_last_error()); return 1; }
 *         DiffusionZParams params = {0};
 *         params.prompt = argv[2];
 *         params.width = params.height = 256;
 *         params.num_steps = 8;
 *         params.seed = 7;
 *         DiffusionZResult result = diffusionz_generate(ctx, &params);
 *         if (result.error_code) fprintf(stderr, "%s\n", result.error_msg);
 *         FILE *file = result.error_code ? NULL : fopen(argv[3], "wb");
 *         int written = file && fwrite(result.image_data, 1, (size_t)result.image_len, file) == (size_t)result.image_len;
 *         if (file && fclose(file)) written = 0;
 *         if (!result.error_code && !written) perror(argv[3]);
 *         diffusionz_free_result(&result);
 *         diffusionz_free(ctx);
 *         return written ? 0 : 1;
 *     }
 *
 * Ownership. What the library allocates it frees: a context with diffusionz_free, the memory inside a result with
 *   diffusionz_free_result, inside a preview with diffusionz_free_preview, a task with diffusionz_task_free, a `char *` with
 *   diffusionz_free_string. A `const char *` that a function returns is borrowed, and its comment says until when. Nothing
 *   that a caller passes in is kept.
 * Threads. Every function may be called from any thread. Calls on one context queue in the order of their arrival;
 *   calls on different contexts run side by side, and contexts of one model share its weights. On the CPU a call works on
 *   several threads, which spin while they wait for each other: on a machine that is busy with other things, set
 *   GOMP_SPINCOUNT=10000 in the environment before the library is loaded, so that a thread that waits sleeps after some 50
 *   microseconds.
 * Errors. A call that can fail returns a status, and diffusionz_last_error() says on the same thread what was wrong,
 *   the value, and what is allowed. No C++ exception and no abort crosses this boundary.
 * Growth. Statuses and enum values are added, never renumbered. A struct that can grow begins with `struct_size`,
 *   which its _init function sets; fields are only appended, and a program built with fewer of them goes on working.
 *   DiffusionZParams and DiffusionZResult never change.
 */
#ifndef DIFFUSIONZ_C_API_H
#define DIFFUSIONZ_C_API_H

#include <stdint.h>

#if defined(_WIN32)
#define DIFFUSIONZ_API __declspec(dllimport)
#elif defined(__GNUC__)
#define DIFFUSIONZ_API __attribute__((visibility("default")))
#else
#define DIFFUSIONZ_API
#endif

#ifdef __cplusplus
extern "C" {
#endif
/* cdef: begin. The Python binding is generated from the lines between these two marks; there is no second copy. */

#define DIFFUSIONZ_ABI_VERSION 1

/* Status of a call. */
enum {
    DIFFUSIONZ_OK = 0,
    DIFFUSIONZ_E_ARGUMENT = 1,      /* a parameter is out of its documented range */
    DIFFUSIONZ_E_MODEL = 2,         /* the model's files are missing, damaged, or of another architecture */
    DIFFUSIONZ_E_LORA = 3,          /* the LoRA file is missing, damaged, or does not fit the model */
    DIFFUSIONZ_E_IMAGE = 4,         /* the given bytes are not a picture that can be read, or it cannot be encoded */
    DIFFUSIONZ_E_OUT_OF_MEMORY = 5, /* of the host or of the device; the context stays usable, and what it kept is given back */
    DIFFUSIONZ_E_DEVICE = 6,        /* there is no such device, or it reported a fault */
    DIFFUSIONZ_E_CANCELLED = 7,     /* diffusionz_task_cancel was called */
    DIFFUSIONZ_E_INTERNAL = 8       /* a defect in the library; please report the message */
};

/* Precision of weights and activations. Z-Image knows FLOAT32, BFLOAT16 and FP8, Chronos-2 all but FP8; another is E_ARGUMENT, and one
 * that the device cannot multiply in is E_DEVICE. */
enum {
    DIFFUSIONZ_PRECISION_AUTO = 0,     /* Z-Image: bfloat16 on CUDA, float32 on the CPU; Chronos-2: float32 */
    DIFFUSIONZ_PRECISION_FLOAT32 = 1,
    DIFFUSIONZ_PRECISION_BFLOAT16 = 2,
    DIFFUSIONZ_PRECISION_FP8 = 3,      /* bfloat16, and the transformer's large products in float8_e4m3 with a scale a row; CUDA devices of
                                          compute capability 8.9 and later */
    DIFFUSIONZ_PRECISION_FLOAT16 = 4,
    DIFFUSIONZ_PRECISION_TF32 = 5      /* float32, multiplied with ten bits of mantissa; CUDA devices */
};

/* What `image_data` of a result holds. */
enum {
    DIFFUSIONZ_FORMAT_WEBP = 0,          /* lossy, at `quality` */
    DIFFUSIONZ_FORMAT_WEBP_LOSSLESS = 1,
    DIFFUSIONZ_FORMAT_PNG = 2,
    DIFFUSIONZ_FORMAT_RGB = 3            /* raw uint8 [height, width, 3], rows from the top, no padding */
};

/* Where a task stands. */
enum {
    DIFFUSIONZ_STAGE_IDLE = 0,   /* not handed to a call yet */
    DIFFUSIONZ_STAGE_QUEUED = 1, /* waits for earlier calls on its context */
    DIFFUSIONZ_STAGE_TEXT = 2,   /* tokenizer and text encoder (and the VAE's encoder, image to image) */
    DIFFUSIONZ_STAGE_DENOISE = 3,
    DIFFUSIONZ_STAGE_DECODE = 4, /* VAE and picture encoding */
    DIFFUSIONZ_STAGE_DONE = 5,   /* the call has returned or is about to, well or badly */
    DIFFUSIONZ_STAGE_FORECAST = 6 /* a forecast's rows (chronos_c_api.h) */
};

/* A loaded model on a device, with its LoRA adapters and its queue. */
typedef struct DiffusionZContext DiffusionZContext;

/* One call's handle for progress and cancelling. */
typedef struct DiffusionZTask DiffusionZTask;

typedef struct {
    const char *prompt;          /* UTF-8, required; an empty string is a prompt */
    const char *negative_prompt; /* UTF-8; NULL is ""; used only when guidance_scale > 0 */
    int32_t width;               /* pixels, a multiple of 16 (twice the VAE's factor), at least 16 */
    int32_t height;              /* likewise; the model's position tables set the maximum */
    int32_t num_steps;           /* transformer evaluations, 1..1000; Z-Image-Turbo wants 8 */
    float guidance_scale;        /* 0 is off; pred = pos + guidance_scale * (pos - neg); at most 1000 */
    int64_t seed;                /* of torch's CPU generator, on every device */
    const char *lora_path;       /* NULL for no LoRA; else one more adapter, for this call alone */
    float lora_weight;           /* -1000..1000; 0.0-1.0 is usual */
} DiffusionZParams;

typedef struct {
    uint8_t *image_data;   /* the encoded picture, or the pixels for DIFFUSIONZ_FORMAT_RGB; NULL on failure */
    int32_t image_len;     /* bytes */
    int32_t width;         /* pixels */
    int32_t height;        /* pixels */
    int32_t error_code;    /* a status */
    const char *error_msg; /* NULL on success; freed with the result */
} DiffusionZResult;

/* How to load a model. */
typedef struct {
    uint32_t struct_size;      /* set by diffusionz_init_options_init */
    int32_t device_id;         /* -1 the CPU (default), else a CUDA device's index */
    int32_t precision;         /* DIFFUSIONZ_PRECISION_*; default AUTO */
    int32_t num_threads;       /* CPU threads of the whole process; 0 leaves them as they are (default) */
    int32_t cuda_graphs;       /* 1 lets the library capture CUDA graphs (default), 0 forbids it */
    int32_t device_count;      /* 1..64: draw on the devices of device_ids, in place of device_id; 0: on device_id (default) */
    const int32_t *device_ids; /* [device_count], as device_id, all of one kind; one listed twice draws two pictures at once. A batch's pictures,
                                  and calls that queue, go to whichever device is free. On devices of one model the pictures are those
                                  of one device, byte for byte */
    int64_t max_vram_bytes;    /* device memory that this process may take for weights and work, on each device; 0: no limit (default). Where the
                                  model does not fit, the text encoder and the VAE stay on the host and come for their stage only. Holds for the
                                  whole process, the last one given; the CUDA driver's own half gigabyte is not counted */
} DiffusionZInitOptions;

/* One picture to draw, with everything that can be asked of it. */
typedef struct {
    uint32_t struct_size;        /* set by diffusionz_request_init */
    int32_t width;               /* as in DiffusionZParams; default 1024 */
    int32_t height;              /* default 1024 */
    int32_t num_steps;           /* default 8 */
    const char *prompt;          /* required */
    const char *negative_prompt; /* default NULL */
    int64_t seed;                /* default 0 */
    float guidance_scale;        /* default 0 */
    float cfg_normalization;     /* > 0 bounds the guided prediction's norm to this multiple of the unguided one; default 0, off; at most 1000 */
    float cfg_truncation;        /* guidance is off once 1 - sigma exceeds this; 0..1000; default 1, never */
    float lora_weight;           /* default 1 */
    const char *lora_path;       /* default NULL */
    const uint8_t *init_image;   /* image to image: raw RGB [height, width, 3] to start from; default NULL */
    float strength;              /* image to image: 0 < strength <= 1, share of the steps that run; default 0.6 */
    int32_t format;              /* DIFFUSIONZ_FORMAT_*; default WEBP */
    int32_t quality;             /* of lossy WebP, 0..100; default 90 */
    int32_t embed_metadata;      /* 1 writes the parameters into the picture (default), 0 does not */
} DiffusionZRequest;

/* A moment in a task's life. */
typedef struct {
    uint32_t struct_size; /* set by the caller to sizeof(DiffusionZProgress) */
    int32_t stage;        /* DIFFUSIONZ_STAGE_*; of pictures drawn side by side that of one, like the times below */
    int32_t step;         /* transformer steps done, over all pictures of the call; rows done of a forecast */
    int32_t step_count;   /* 0 until it is known */
    int32_t image;        /* pictures finished */
    int32_t image_count;
    float queue_ms;       /* milliseconds spent in each stage so far */
    float text_ms;
    float denoise_ms;
    float decode_ms;
    float forecast_ms;
} DiffusionZProgress;

/* A picture in the making: what it would become if the rest of its way were straight. Coarse at first, then ever closer to the picture. */
typedef struct {
    uint32_t struct_size;  /* set by the caller to sizeof(DiffusionZPreview) */
    int32_t image;         /* which of the call's pictures this is of, from 0 */
    int32_t preview;       /* which of that picture's previews, from 0 */
    int32_t preview_count; /* previews of that picture in all */
    int32_t step;          /* steps of that picture done by then */
    int32_t step_count;    /* steps of that picture in all */
    int32_t width;         /* pixels: half the picture's */
    int32_t height;        /* likewise */
    uint8_t *rgb;          /* raw uint8 [height, width, 3], rows from the top, no padding; NULL when there is no preview */
} DiffusionZPreview;

typedef struct {
    uint32_t struct_size;      /* set by the caller to sizeof(DiffusionZDeviceInfo) */
    int32_t device_id;         /* -1 the CPU */
    char name[128];
    int64_t memory_total_bytes;
    int64_t memory_free_bytes;
    int32_t compute_capability; /* 90 for 9.0; 0 for the CPU */
} DiffusionZDeviceInfo;

/* Bytes that a context's model holds. Contexts of one model share its weights: do not add them up. */
typedef struct {
    uint32_t struct_size;      /* set by the caller to sizeof(DiffusionZMemoryInfo) */
    int32_t shared_by;         /* contexts that share the weights, this one included */
    int64_t weights_bytes;     /* on the context's devices */
    int64_t lora_bytes;        /* this context's adapters */
    /* Of the whole process on the context's CUDA devices; 0 on the CPU. */
    int64_t device_bytes;      /* in use: weights, adapters, graphs, and what running calls work in */
    int64_t device_peak_bytes; /* the most that was in use since the process began */
    int64_t device_held_bytes; /* taken from the devices: in use, and kept for the next call */
} DiffusionZMemoryInfo;

/* --- Library ------------------------------------------------------------------------------------------------ */

/* "0.1.0"; static. */
DIFFUSIONZ_API const char *diffusionz_version(void);

/* DIFFUSIONZ_ABI_VERSION of the library that is loaded; compare it with the header's. */
DIFFUSIONZ_API int32_t diffusionz_abi_version(void);

/* "DIFFUSIONZ_E_ARGUMENT" for 1, and so on; "unknown status" for a number that is none; static. */
DIFFUSIONZ_API const char *diffusionz_status_name(int32_t status);

/* Why the last call on this thread failed; "" if it did not. Never NULL. Valid until the thread's next call. */
DIFFUSIONZ_API const char *diffusionz_last_error(void);

/* Frees a string that the library returned as `char *`. NULL is fine. */
DIFFUSIONZ_API void diffusionz_free_string(char *text);

/* CUDA devices that the library can use; 0 where it was built without CUDA or none is there. */
DIFFUSIONZ_API int32_t diffusionz_device_count(void);

/* Fills `info` for the CPU (-1) or a CUDA device. E_ARGUMENT, E_DEVICE. */
DIFFUSIONZ_API int32_t diffusionz_device_info(int32_t device_id, DiffusionZDeviceInfo *info);

/* --- Context ------------------------------------------------------------------------------------------------ */

/* Loads a model at default options. `model_path` is a folder in the diffusers layout, a folder of single files in
 * ComfyUI's (diffusion_models/, text_encoders/, vae/, and tokenizer/), or one safetensors file that holds all
 * components with tokenizer.json beside it. `device_id` -1 is the CPU. NULL on failure: diffusionz_last_error() says
 * why. Some possible errors: E_MODEL, E_DEVICE, E_OUT_OF_MEMORY. */
DIFFUSIONZ_API DiffusionZContext *diffusionz_init(const char *model_path, int device_id);

/* Defaults for a struct of that size: what a binding calls that does not compile this header. The name without _sized is, for C and C++,
 * a macro at the end of this file that gives the size; as a symbol it is for programs built when the struct ended with cuda_graphs. */
DIFFUSIONZ_API void diffusionz_init_options_init_sized(DiffusionZInitOptions *options, uint32_t struct_size);
DIFFUSIONZ_API void diffusionz_init_options_init(DiffusionZInitOptions *options);

/* diffusionz_init with options; `*out` is NULL on failure. E_ARGUMENT also for an unknown struct_size, E_OUT_OF_MEMORY also when
 * the model cannot be had in max_vram_bytes: the message says in how many it can. */
DIFFUSIONZ_API int32_t diffusionz_init_with_options(const char *model_path, const DiffusionZInitOptions *options, DiffusionZContext **out);

/* Waits for the calls that run or queue on the context, then frees it. No call may be made with it afterwards. NULL is fine. */
DIFFUSIONZ_API void diffusionz_free(DiffusionZContext *ctx);

/* What the model is, as JSON: family, path, device, precision, parameter counts, sizes allowed, scheduler. Borrowed; valid as long
 * as the context. NULL for a NULL context. */
DIFFUSIONZ_API const char *diffusionz_model_info(const DiffusionZContext *ctx);

/* E_ARGUMENT. */
DIFFUSIONZ_API int32_t diffusionz_memory_info(DiffusionZContext *ctx, DiffusionZMemoryInfo *info);

/* --- Drawing ------------------------------------------------------------------------------------------------ */

/* Draws one picture, as lossy WebP of quality 90 with its parameters inside. Blocks until done. Always returns a result; its
 * error_code is E_ARGUMENT, E_MODEL, E_LORA, E_OUT_OF_MEMORY or E_DEVICE on failure. Free it with diffusionz_free_result either way.
 * The same parameters, library and device give the same bytes. */
DIFFUSIONZ_API DiffusionZResult diffusionz_generate(DiffusionZContext *ctx, const DiffusionZParams *params);

/* Frees what a result holds and empties it; a second call and NULL are fine. */
DIFFUSIONZ_API void diffusionz_free_result(DiffusionZResult *result);

DIFFUSIONZ_API void diffusionz_request_init(DiffusionZRequest *request);

/* Draws `count` pictures (1..1024) in one place of the queue and fills results[0..count-1]. To draw variations of one prompt, give picture i
 * the seed `seed + i`. All requests are checked before the first is drawn. `task` may be NULL. On failure the status is returned,
 * every result is empty and carries the status and message, and the context stays usable. E_ARGUMENT, E_MODEL, E_LORA, E_CANCELLED, E_OUT_OF_MEMORY,
 * E_DEVICE. */
DIFFUSIONZ_API int32_t diffusionz_generate_batch(DiffusionZContext *ctx, const DiffusionZRequest *requests, int32_t count,
                                                 DiffusionZTask *task, DiffusionZResult *results);

/* A task serves one call (diffusionz_generate_batch, chronos_forecast, chronos_embed); a second use of it is E_ARGUMENT. NULL when memory is out. */
DIFFUSIONZ_API DiffusionZTask *diffusionz_task_new(void);

/* Asks the task's call to stop, before or while it runs: it returns E_CANCELLED within one transformer step or preview. Never
 * lost: a task cancelled before its call begins ends that call at once. Quiet when the call is over. */
DIFFUSIONZ_API void diffusionz_task_cancel(DiffusionZTask *task);

/* Poll from any thread while the call runs, or after it for the times it took. E_ARGUMENT. */
DIFFUSIONZ_API int32_t diffusionz_task_progress(const DiffusionZTask *task, DiffusionZProgress *progress);

/* Before the task's call: has it make `count` previews of each picture, 0..999; 0 is none (default). Preview k of n (k from 1) is made after
 * step k * steps / (n + 1), rounded down: so never after the last step. Where n is not under the steps, there is one after each step but the last.
 * A preview takes about a quarter of the time that decoding its picture does, which counts as the denoise stage's, and a VAE that max_vram_bytes
 * keeps on the host comes for each. One that there is no memory for is left out. The pictures are the same, bit for bit. Forecasts have none.
 * E_ARGUMENT also for a task that was handed to a call. */
DIFFUSIONZ_API int32_t diffusionz_task_keep_previews(DiffusionZTask *task, int32_t count);

/* Hands out the newest preview that nobody took yet: the caller frees it with diffusionz_free_preview. With none there, `rgb` is NULL and the
 * other fields are 0, which is no error. The task holds one preview at most, of all its pictures: a newer one replaces it. Poll from any
 * thread while the call runs, or after it. E_ARGUMENT. */
DIFFUSIONZ_API int32_t diffusionz_task_take_preview(DiffusionZTask *task, DiffusionZPreview *preview);

/* Frees what a preview holds and empties it; a second call and NULL are fine. */
DIFFUSIONZ_API void diffusionz_free_preview(DiffusionZPreview *preview);

/* Not before the task's call has returned. NULL is fine. */
DIFFUSIONZ_API void diffusionz_task_free(DiffusionZTask *task);

/* --- LoRA --------------------------------------------------------------------------------------------------- */

/* Adds an adapter (safetensors, of diffusers/PEFT or kohya naming) to every later call on the context, on top of those loaded before;
 * the same path again sets its weight, -1000..1000. The base weights are not touched. E_LORA also when under 95 % of the file's
 * keys match the model: the message names keys that do not. E_ARGUMENT, E_OUT_OF_MEMORY. */
DIFFUSIONZ_API int32_t diffusionz_load_lora(DiffusionZContext *ctx, const char *lora_path, float weight);

/* Removes all adapters: later pictures are bit for bit those of the base model. */
DIFFUSIONZ_API int32_t diffusionz_unload_lora(DiffusionZContext *ctx);

/* --- Pictures ----------------------------------------------------------------------------------------------- */

/* Encodes raw RGB [height, width, 3] into `out` (free it with diffusionz_free_result). `metadata_json` may be NULL; it is what diffusionz_image_metadata
 * gives back, and its "parameters" string is also written the way A1111 does. E_ARGUMENT, E_IMAGE. */
DIFFUSIONZ_API int32_t diffusionz_image_encode(const uint8_t *rgb, int32_t width, int32_t height, int32_t format, int32_t quality,
                                               const char *metadata_json, DiffusionZResult *out);

/* Decodes PNG or WebP bytes to raw RGB. Alpha is dropped over black. E_ARGUMENT, E_IMAGE. */
DIFFUSIONZ_API int32_t diffusionz_image_decode(const uint8_t *data, int64_t size_bytes, DiffusionZResult *out);

/* The generation parameters in a PNG or WebP as JSON, "{}" when it has none. E_ARGUMENT, E_IMAGE. Free `*out` with diffusionz_free_string. */
DIFFUSIONZ_API int32_t diffusionz_image_metadata(const uint8_t *data, int64_t size_bytes, char **out);

/* The metadata that a picture of `request` carries, as JSON; for a caller that takes raw RGB and encodes later. Free `*out` with diffusionz_free_string. */
DIFFUSIONZ_API int32_t diffusionz_request_metadata(const DiffusionZContext *ctx, const DiffusionZRequest *request, char **out);

/* cdef: end */

/* An _init that knew only the library's size of a struct would write past the end of an older program's. */
#define diffusionz_init_options_init(options) diffusionz_init_options_init_sized((options), (uint32_t)sizeof *(options))

#ifdef __cplusplus
}
#endif
#endif /* DIFFUSIONZ_C_API_H */
