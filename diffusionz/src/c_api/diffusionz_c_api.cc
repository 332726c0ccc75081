// The exports of diffusionz_c_api.h: each checks its pointers, calls the engine inside guard(), and hands out memory.

#include "diffusionz_c_api.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "c_api/arguments.h"
#include "c_api/guard.h"
#include "core/device.h"
#include "core/threads.h"
#include "image/metadata.h"
#include "image/png.h"
#include "image/webp.h"
#include "zimage/fleet.h"

using namespace diffusionz;

struct DiffusionZContext {
    DiffusionZContext(const char* path, const std::vector<Placement>& placements, const DiffusionZInitOptions& options)
        : fleet(path, placements, options.cuda_graphs != 0, options.max_vram_bytes), info(fleet.info()) {}
    Fleet fleet;
    std::string info;
    ContextUse use;
};

namespace {

char* copy_string(const std::string& text) {
    char* copy = static_cast<char*>(std::malloc(text.size() + 1));
    if (!copy) throw std::bad_alloc();
    std::memcpy(copy, text.c_str(), text.size() + 1);
    return copy;
}

// Moves bytes into memory that diffusionz_free_result frees.
void set_image(DiffusionZResult& result, const uint8_t* data, size_t size_bytes, int32_t width, int32_t height) {
    if (size_bytes > INT32_MAX)
        fail(DIFFUSIONZ_E_IMAGE, "the encoded picture has ", size_bytes, " bytes; a result holds at most ", INT32_MAX);
    result.image_data = static_cast<uint8_t*>(std::malloc(size_bytes ? size_bytes : 1));
    if (!result.image_data) throw std::bad_alloc();
    std::memcpy(result.image_data, data, size_bytes);
    result.image_len = static_cast<int32_t>(size_bytes);
    result.width = width;
    result.height = height;
}

void encode(DiffusionZResult& result, const uint8_t* rgb, int32_t width, int32_t height, int32_t format, int32_t quality,
            const std::string& metadata) {
    if (format == DIFFUSIONZ_FORMAT_RGB)
        return set_image(result, rgb, size_t{3} * static_cast<size_t>(width) * static_cast<size_t>(height), width, height);
    const std::vector<uint8_t> bytes =
        format == DIFFUSIONZ_FORMAT_PNG
            ? encode_png(rgb, width, height, metadata)
            : encode_webp(rgb, width, height, format == DIFFUSIONZ_FORMAT_WEBP_LOSSLESS, quality, metadata);
    set_image(result, bytes.data(), bytes.size(), width, height);
}

// Fails with E_ARGUMENT where the picture could be drawn but not be encoded: its texts are too long to be written into it.
void check_metadata(const DiffusionZContext& ctx, const DiffusionZRequest& request) {
    if (request.format == DIFFUSIONZ_FORMAT_RGB || !request.embed_metadata) return;
    const size_t size = ctx.fleet.metadata(request).size();
    if (size > kMetadataBytesMax) {
        fail(DIFFUSIONZ_E_ARGUMENT, "prompt and negative_prompt make metadata of ", size, " bytes; at most ", kMetadataBytesMax,
             " are allowed in a picture, any number with embed_metadata 0");
    }
}

// Encodes a call's pictures while the next ones are drawn.
class Encoders {
public:
    // Encodes where it is called when `alone` says that no picture follows.
    explicit Encoders(bool alone) : alone_(alone) {}

    // Any thread.
    void add(std::function<void()> encode) {
        if (alone_) return encode();
        const std::lock_guard lock(mutex_);
        if (running_.size() == kRunningMax) {
            running_.front().get();
            running_.pop_front();
        }
        running_.push_back(std::async(std::launch::async, std::move(encode)));
    }
    // Waits for all of them, and throws what one threw.
    void finish() {
        for (auto& encoding : running_) encoding.get();
    }

private:
    static constexpr size_t kRunningMax = 8;  // else small pictures could be drawn faster than they are encoded

    bool alone_;
    std::mutex mutex_;
    std::deque<std::future<void>> running_;
};

// The devices that the options ask for. Fails with E_ARGUMENT, E_DEVICE.
std::vector<Placement> placements_of(const DiffusionZInitOptions& options) {
    constexpr int32_t kDevicesMax = 64;
    if (options.device_count < 0 || options.device_count > kDevicesMax)
        fail(DIFFUSIONZ_E_ARGUMENT, "device_count is ", options.device_count, "; it must be from 0 to ", kDevicesMax);
    if (options.device_count > 0 && !options.device_ids)
        fail(DIFFUSIONZ_E_ARGUMENT, "device_ids is NULL, device_count ", options.device_count);
    const int32_t* ids = options.device_count > 0 ? options.device_ids : &options.device_id;
    std::vector<Placement> placements;
    for (int32_t i = 0; i < std::max(options.device_count, 1); ++i) {
        placements.push_back(placement_of(ids[i], options.precision, Family::zimage));
        if (placements[i].device.type() != placements[0].device.type()) {
            fail(DIFFUSIONZ_E_ARGUMENT, "device_ids has ", ids[0], " and ", ids[i],
                 "; they must be the CPU (-1) or CUDA devices (0 and up) all of them");
        }
    }
    return placements;
}

// Empties a result and gives it the last error.
void set_failure(DiffusionZResult& result, int32_t status) noexcept {
    diffusionz_free_result(&result);
    result.error_code = status;
    // With no memory left the message is lost, the status is not.
    result.error_msg = strdup(last_error().c_str());
}

std::span<const uint8_t> check_bytes(const uint8_t* data, int64_t size_bytes) {
    if (!data) fail(DIFFUSIONZ_E_ARGUMENT, "data is NULL");
    if (size_bytes < 0) fail(DIFFUSIONZ_E_ARGUMENT, "size_bytes is ", size_bytes, "; it must not be negative");
    return {data, static_cast<size_t>(size_bytes)};
}

}  // namespace

extern "C" {

const char* diffusionz_version(void) { return DIFFUSIONZ_VERSION; }

int32_t diffusionz_abi_version(void) { return DIFFUSIONZ_ABI_VERSION; }

const char* diffusionz_status_name(int32_t status) {
    switch (status) {
        case DIFFUSIONZ_OK:
            return "DIFFUSIONZ_OK";
        case DIFFUSIONZ_E_ARGUMENT:
            return "DIFFUSIONZ_E_ARGUMENT";
        case DIFFUSIONZ_E_MODEL:
            return "DIFFUSIONZ_E_MODEL";
        case DIFFUSIONZ_E_LORA:
            return "DIFFUSIONZ_E_LORA";
        case DIFFUSIONZ_E_IMAGE:
            return "DIFFUSIONZ_E_IMAGE";
        case DIFFUSIONZ_E_OUT_OF_MEMORY:
            return "DIFFUSIONZ_E_OUT_OF_MEMORY";
        case DIFFUSIONZ_E_DEVICE:
            return "DIFFUSIONZ_E_DEVICE";
        case DIFFUSIONZ_E_CANCELLED:
            return "DIFFUSIONZ_E_CANCELLED";
        case DIFFUSIONZ_E_INTERNAL:
            return "DIFFUSIONZ_E_INTERNAL";
    }
    return "unknown status";
}

const char* diffusionz_last_error(void) { return last_error().c_str(); }

void diffusionz_free_string(char* text) { std::free(text); }

int32_t diffusionz_device_count(void) {
    int32_t count = 0;
    guard([&] { count = cuda_device_count(); });
    return count;
}

int32_t diffusionz_device_info(int32_t device_id, DiffusionZDeviceInfo* info) {
    return guard([&] {
        check_size("info", info);
        describe_device(device_id, *info);
    });
}

DiffusionZContext* diffusionz_init(const char* model_path, int device_id) {
    DiffusionZInitOptions options;
    diffusionz_init_options_init(&options);
    options.device_id = device_id;
    DiffusionZContext* ctx = nullptr;
    diffusionz_init_with_options(model_path, &options, &ctx);
    return ctx;
}

void diffusionz_init_options_init_sized(DiffusionZInitOptions* options, uint32_t struct_size) {
    if (!options || struct_size < kEarlierSizes<DiffusionZInitOptions>[0]) return;
    DiffusionZInitOptions defaults{};
    defaults.struct_size = std::min<uint32_t>(struct_size, sizeof defaults);
    defaults.device_id = -1;
    defaults.cuda_graphs = 1;
    std::memcpy(options, &defaults, defaults.struct_size);
}

// The name in brackets is not the header's macro.
void(diffusionz_init_options_init)(DiffusionZInitOptions* options) {
    diffusionz_init_options_init_sized(options, kEarlierSizes<DiffusionZInitOptions>[0]);
}

int32_t diffusionz_init_with_options(const char* model_path, const DiffusionZInitOptions* given, DiffusionZContext** out) {
    if (out) *out = nullptr;
    return guard([&] {
        if (!model_path) fail(DIFFUSIONZ_E_ARGUMENT, "model_path is NULL");
        if (!out) fail(DIFFUSIONZ_E_ARGUMENT, "out is NULL");
        const DiffusionZInitOptions options = read_struct("options", given);
        if (options.cuda_graphs != 0 && options.cuda_graphs != 1)
            fail(DIFFUSIONZ_E_ARGUMENT, "cuda_graphs is ", options.cuda_graphs, "; it must be 0 or 1");
        if (options.max_vram_bytes < 0)
            fail(DIFFUSIONZ_E_ARGUMENT, "max_vram_bytes is ", options.max_vram_bytes, "; it must be over 0, or 0 for no limit");
        const std::vector<Placement> placements = placements_of(options);
        want_threads(options.num_threads);
        if (options.max_vram_bytes > 0) {
            for (const Placement& placement : placements) limit_device_memory(placement.device, options.max_vram_bytes);
        }
        *out = new DiffusionZContext(model_path, placements, options);
    });
}

void diffusionz_free(DiffusionZContext* ctx) {
    if (!ctx) return;
    guard([&] { ctx->use.wait(); });
    delete ctx;
}

const char* diffusionz_model_info(const DiffusionZContext* ctx) { return ctx ? ctx->info.c_str() : nullptr; }

int32_t diffusionz_memory_info(DiffusionZContext* ctx, DiffusionZMemoryInfo* info) {
    return guard([&] {
        const auto inside = enter_context(ctx);
        check_size("info", info);
        write_struct(ctx->fleet.memory(), info);
    });
}

DiffusionZResult diffusionz_generate(DiffusionZContext* ctx, const DiffusionZParams* params) {
    DiffusionZResult result{};
    if (!params) {
        remember(DIFFUSIONZ_E_ARGUMENT, "params is NULL");
        set_failure(result, DIFFUSIONZ_E_ARGUMENT);
        return result;
    }
    DiffusionZRequest request;
    diffusionz_request_init(&request);
    request.prompt = params->prompt;
    request.negative_prompt = params->negative_prompt;
    request.width = params->width;
    request.height = params->height;
    request.num_steps = params->num_steps;
    request.guidance_scale = params->guidance_scale;
    request.seed = params->seed;
    request.lora_path = params->lora_path;
    request.lora_weight = params->lora_weight;
    diffusionz_generate_batch(ctx, &request, 1, nullptr, &result);
    return result;
}

void diffusionz_free_result(DiffusionZResult* result) {
    if (!result) return;
    std::free(result->image_data);
    std::free(const_cast<char*>(result->error_msg));
    *result = {};
}

void diffusionz_request_init(DiffusionZRequest* request) {
    if (!request) return;
    *request = {};
    request->struct_size = sizeof *request;
    request->width = request->height = 1024;
    request->num_steps = 8;
    request->cfg_truncation = 1;
    request->lora_weight = 1;
    request->strength = 0.6f;
    request->format = DIFFUSIONZ_FORMAT_WEBP;
    request->quality = 90;
    request->embed_metadata = 1;
}

int32_t diffusionz_generate_batch(DiffusionZContext* ctx, const DiffusionZRequest* requests, int32_t count, DiffusionZTask* task,
                                  DiffusionZResult* results) {
    constexpr int32_t kCountMax = 1024;
    const bool writable = results && count >= 1 && count <= kCountMax;
    if (writable) std::fill_n(results, count, DiffusionZResult{});
    const int32_t status = guard([&] {
        Task own;  // for a caller that does not watch
        Task& watched = task ? task->task : own;
        const auto inside = enter_context(ctx);
        if (!requests) fail(DIFFUSIONZ_E_ARGUMENT, "requests is NULL");
        if (!results) fail(DIFFUSIONZ_E_ARGUMENT, "results is NULL");
        if (count < 1 || count > kCountMax) fail(DIFFUSIONZ_E_ARGUMENT, "count is ", count, "; it must be from 1 to ", kCountMax);
        for (int32_t i = 0; i < count; ++i) {
            check_size("request", &requests[i]);
            ctx->fleet.check(requests[i]);
            check_metadata(*ctx, requests[i]);
        }
        watched.begin(count);
        apply_threads();
        const TaskEnd end(watched);
        Encoders encoders(/*alone=*/count == 1);
        ctx->fleet.generate({requests, static_cast<size_t>(count)}, watched, [&](size_t i, Picture picture) {
            encoders.add([ctx, &request = requests[i], &result = results[i], picture = std::move(picture)] {
                encode(result, picture.pixels.const_data_ptr<uint8_t>(), request.width, request.height, request.format,
                       request.quality, request.embed_metadata ? ctx->fleet.metadata(request) : std::string());
            });
        });
        encoders.finish();
    });
    if (status != DIFFUSIONZ_OK && writable) {
        for (int32_t i = 0; i < count; ++i) set_failure(results[i], status);
    }
    return status;
}

DiffusionZTask* diffusionz_task_new(void) { return new (std::nothrow) DiffusionZTask; }

void diffusionz_task_cancel(DiffusionZTask* task) {
    if (task) task->task.cancel();
}

int32_t diffusionz_task_progress(const DiffusionZTask* task, DiffusionZProgress* progress) {
    return guard([&] {
        if (!task) fail(DIFFUSIONZ_E_ARGUMENT, "task is NULL");
        check_size("progress", progress);
        task->task.read(*progress);
    });
}

int32_t diffusionz_task_keep_previews(DiffusionZTask* task, int32_t count) {
    constexpr int32_t kPreviewsMax = 999;  // one after each step but the last of as many as there can be
    return guard([&] {
        if (!task) fail(DIFFUSIONZ_E_ARGUMENT, "task is NULL");
        if (count < 0 || count > kPreviewsMax)
            fail(DIFFUSIONZ_E_ARGUMENT, "count of previews is ", count, "; it must be from 0 to ", kPreviewsMax);
        task->task.keep_previews(count);
    });
}

int32_t diffusionz_task_take_preview(DiffusionZTask* task, DiffusionZPreview* preview) {
    return guard([&] {
        check_size("preview", preview);
        write_struct(DiffusionZPreview{}, preview);
        if (!task) fail(DIFFUSIONZ_E_ARGUMENT, "task is NULL");
        std::optional<Preview> taken = task->task.take_preview();
        if (!taken) return;
        DiffusionZPreview whole{};
        whole.image = taken->image;
        whole.preview = taken->preview;
        whole.preview_count = taken->preview_count;
        whole.step = taken->step;
        whole.step_count = taken->step_count;
        whole.width = taken->width;
        whole.height = taken->height;
        whole.rgb = taken->rgb.release();
        write_struct(whole, preview);
    });
}

void diffusionz_free_preview(DiffusionZPreview* preview) {
    if (!preview) return;
    std::free(preview->rgb);
    const uint32_t size = preview->struct_size;
    *preview = {};
    preview->struct_size = size;
}

void diffusionz_task_free(DiffusionZTask* task) { delete task; }

int32_t diffusionz_load_lora(DiffusionZContext* ctx, const char* lora_path, float weight) {
    return guard([&] {
        const auto inside = enter_context(ctx);
        if (!lora_path) fail(DIFFUSIONZ_E_ARGUMENT, "lora_path is NULL");
        ctx->fleet.load_lora(lora_path, weight);
    });
}

int32_t diffusionz_unload_lora(DiffusionZContext* ctx) {
    return guard([&] {
        const auto inside = enter_context(ctx);
        ctx->fleet.unload_lora();
    });
}

int32_t diffusionz_image_encode(const uint8_t* rgb, int32_t width, int32_t height, int32_t format, int32_t quality,
                                const char* metadata_json, DiffusionZResult* out) {
    if (out) *out = {};
    const int32_t status = guard([&] {
        if (!rgb) fail(DIFFUSIONZ_E_ARGUMENT, "rgb is NULL");
        if (!out) fail(DIFFUSIONZ_E_ARGUMENT, "out is NULL");
        if (width < 1 || height < 1 || int64_t{3} * width * height > INT32_MAX)
            fail(DIFFUSIONZ_E_ARGUMENT, width, " x ", height,
                 " pixels; both sides must be over 0 and the pixels under 2^31 bytes");
        if (format < DIFFUSIONZ_FORMAT_WEBP || format > DIFFUSIONZ_FORMAT_RGB)
            fail(DIFFUSIONZ_E_ARGUMENT, "format is ", format, "; it must be DIFFUSIONZ_FORMAT_* (0 to 3)");
        if (quality < 0 || quality > 100) fail(DIFFUSIONZ_E_ARGUMENT, "quality is ", quality, "; it must be from 0 to 100");
        encode(*out, rgb, width, height, format, quality, metadata_json ? metadata_json : "");
    });
    if (status != DIFFUSIONZ_OK && out) set_failure(*out, status);
    return status;
}

int32_t diffusionz_image_decode(const uint8_t* data, int64_t size_bytes, DiffusionZResult* out) {
    if (out) *out = {};
    const int32_t status = guard([&] {
        if (!out) fail(DIFFUSIONZ_E_ARGUMENT, "out is NULL");
        const Rgb image = decode_image(check_bytes(data, size_bytes));
        set_image(*out, image.pixels.data(), image.pixels.size(), image.width, image.height);
    });
    if (status != DIFFUSIONZ_OK && out) set_failure(*out, status);
    return status;
}

int32_t diffusionz_image_metadata(const uint8_t* data, int64_t size_bytes, char** out) {
    if (out) *out = nullptr;
    return guard([&] {
        if (!out) fail(DIFFUSIONZ_E_ARGUMENT, "out is NULL");
        *out = copy_string(read_metadata(check_bytes(data, size_bytes)));
    });
}

int32_t diffusionz_request_metadata(const DiffusionZContext* ctx, const DiffusionZRequest* request, char** out) {
    if (out) *out = nullptr;
    return guard([&] {
        const auto inside = enter_context(ctx);
        if (!out) fail(DIFFUSIONZ_E_ARGUMENT, "out is NULL");
        check_size("request", request);
        ctx->fleet.check(*request);
        *out = copy_string(ctx->fleet.metadata(*request));
    });
}

}  // extern "C"
