/* ABI version 1, byte by byte, on a 64-bit system. A line that fails is a program out there that breaks. */
#include <stddef.h>

#include <chronos_c_api.h>

#define FIELD(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field)
#define SIZE(type, size) _Static_assert(sizeof(type) == (size), #type)

_Static_assert(DIFFUSIONZ_ABI_VERSION == 1, "a new version of the ABI has its own layouts");

/* These two are the original document's and never change. */
FIELD(DiffusionZParams, prompt, 0);
FIELD(DiffusionZParams, negative_prompt, 8);
FIELD(DiffusionZParams, width, 16);
FIELD(DiffusionZParams, height, 20);
FIELD(DiffusionZParams, num_steps, 24);
FIELD(DiffusionZParams, guidance_scale, 28);
FIELD(DiffusionZParams, seed, 32);
FIELD(DiffusionZParams, lora_path, 40);
FIELD(DiffusionZParams, lora_weight, 48);
SIZE(DiffusionZParams, 56);

FIELD(DiffusionZResult, image_data, 0);
FIELD(DiffusionZResult, image_len, 8);
FIELD(DiffusionZResult, width, 12);
FIELD(DiffusionZResult, height, 16);
FIELD(DiffusionZResult, error_code, 20);
FIELD(DiffusionZResult, error_msg, 24);
SIZE(DiffusionZResult, 32);

/* These grow at their end: the offsets stay, the sizes are this version's. */
FIELD(DiffusionZInitOptions, struct_size, 0);
FIELD(DiffusionZInitOptions, device_id, 4);
FIELD(DiffusionZInitOptions, precision, 8);
FIELD(DiffusionZInitOptions, num_threads, 12);
FIELD(DiffusionZInitOptions, cuda_graphs, 16);
FIELD(DiffusionZInitOptions, device_count, 20); /* the struct ended here once */
FIELD(DiffusionZInitOptions, device_ids, 24);
FIELD(DiffusionZInitOptions, max_vram_bytes, 32);
SIZE(DiffusionZInitOptions, 40);

FIELD(DiffusionZRequest, struct_size, 0);
FIELD(DiffusionZRequest, width, 4);
FIELD(DiffusionZRequest, height, 8);
FIELD(DiffusionZRequest, num_steps, 12);
FIELD(DiffusionZRequest, prompt, 16);
FIELD(DiffusionZRequest, negative_prompt, 24);
FIELD(DiffusionZRequest, seed, 32);
FIELD(DiffusionZRequest, guidance_scale, 40);
FIELD(DiffusionZRequest, cfg_normalization, 44);
FIELD(DiffusionZRequest, cfg_truncation, 48);
FIELD(DiffusionZRequest, lora_weight, 52);
FIELD(DiffusionZRequest, lora_path, 56);
FIELD(DiffusionZRequest, init_image, 64);
FIELD(DiffusionZRequest, strength, 72);
FIELD(DiffusionZRequest, format, 76);
FIELD(DiffusionZRequest, quality, 80);
FIELD(DiffusionZRequest, embed_metadata, 84);
SIZE(DiffusionZRequest, 88);

FIELD(DiffusionZProgress, struct_size, 0);
FIELD(DiffusionZProgress, stage, 4);
FIELD(DiffusionZProgress, step, 8);
FIELD(DiffusionZProgress, step_count, 12);
FIELD(DiffusionZProgress, image, 16);
FIELD(DiffusionZProgress, image_count, 20);
FIELD(DiffusionZProgress, queue_ms, 24);
FIELD(DiffusionZProgress, text_ms, 28);
FIELD(DiffusionZProgress, denoise_ms, 32);
FIELD(DiffusionZProgress, decode_ms, 36);
FIELD(DiffusionZProgress, forecast_ms, 40);
SIZE(DiffusionZProgress, 44);

FIELD(DiffusionZPreview, struct_size, 0);
FIELD(DiffusionZPreview, image, 4);
FIELD(DiffusionZPreview, preview, 8);
FIELD(DiffusionZPreview, preview_count, 12);
FIELD(DiffusionZPreview, step, 16);
FIELD(DiffusionZPreview, step_count, 20);
FIELD(DiffusionZPreview, width, 24);
FIELD(DiffusionZPreview, height, 28);
FIELD(DiffusionZPreview, rgb, 32);
SIZE(DiffusionZPreview, 40);

FIELD(DiffusionZDeviceInfo, struct_size, 0);
FIELD(DiffusionZDeviceInfo, device_id, 4);
FIELD(DiffusionZDeviceInfo, name, 8);
FIELD(DiffusionZDeviceInfo, memory_total_bytes, 136);
FIELD(DiffusionZDeviceInfo, memory_free_bytes, 144);
FIELD(DiffusionZDeviceInfo, compute_capability, 152);
SIZE(DiffusionZDeviceInfo, 160);

FIELD(DiffusionZMemoryInfo, struct_size, 0);
FIELD(DiffusionZMemoryInfo, shared_by, 4);
FIELD(DiffusionZMemoryInfo, weights_bytes, 8);
FIELD(DiffusionZMemoryInfo, lora_bytes, 16);
FIELD(DiffusionZMemoryInfo, device_bytes, 24); /* the struct ended here once */
FIELD(DiffusionZMemoryInfo, device_peak_bytes, 32);
FIELD(DiffusionZMemoryInfo, device_held_bytes, 40);
SIZE(DiffusionZMemoryInfo, 48);

FIELD(ChronosInitOptions, struct_size, 0);
FIELD(ChronosInitOptions, device_id, 4);
FIELD(ChronosInitOptions, precision, 8);
FIELD(ChronosInitOptions, num_threads, 12);
FIELD(ChronosInitOptions, lora_path, 16);
FIELD(ChronosInitOptions, working_memory_bytes, 24);
SIZE(ChronosInitOptions, 32);

FIELD(ChronosRequest, struct_size, 0);
FIELD(ChronosRequest, level_count, 4);
FIELD(ChronosRequest, row_count, 8);
FIELD(ChronosRequest, context, 16);
FIELD(ChronosRequest, context_offsets, 24);
FIELD(ChronosRequest, group_ids, 32);
FIELD(ChronosRequest, row_kinds, 40);
FIELD(ChronosRequest, future, 48);
FIELD(ChronosRequest, quantile_levels, 56);
FIELD(ChronosRequest, prediction_length, 64);
FIELD(ChronosRequest, context_length, 72);
FIELD(ChronosRequest, monotone, 76);
FIELD(ChronosRequest, constrain_ohlc, 80);
FIELD(ChronosRequest, reserved, 84);
SIZE(ChronosRequest, 88);

/* These are filled by the library and have no size to tell it by: they never change. */
FIELD(ChronosForecast, quantiles, 0);
FIELD(ChronosForecast, quantile_levels, 8);
FIELD(ChronosForecast, target_count, 16);
FIELD(ChronosForecast, prediction_length, 24);
FIELD(ChronosForecast, level_count, 32);
FIELD(ChronosForecast, median_index, 36);
SIZE(ChronosForecast, 40);

FIELD(ChronosEmbedding, values, 0);
FIELD(ChronosEmbedding, token_offsets, 8);
FIELD(ChronosEmbedding, loc, 16);
FIELD(ChronosEmbedding, scale, 24);
FIELD(ChronosEmbedding, row_count, 32);
FIELD(ChronosEmbedding, width, 40);
FIELD(ChronosEmbedding, reserved, 44);
SIZE(ChronosEmbedding, 48);

_Static_assert(CHRONOS_ROW_TARGET == 0 && CHRONOS_ROW_COVARIATE == 1, "row kinds");

int main(void) { return 0; }
