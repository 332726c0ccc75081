#include "zimage/engine.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "core/device.h"
#include "core/error.h"

namespace diffusionz {
namespace {

constexpr size_t kPromptTokensMax = 512;  // as the reference cuts
constexpr int32_t kStepsMax = 1000;

// The number that a person wrote: 0.3f is 0.30000001, which would start image to image a step off.
double decimal(float value) { return std::round(static_cast<double>(value) * 1e6) / 1e6; }

std::vector<float> sigmas_of(const Model& model, const DiffusionZRequest& request) {
    const int64_t multiple = model.size_multiple();
    return make_sigmas(model.scheduler(), request.num_steps, (request.width / multiple) * (request.height / multiple));
}

// Steps that image to image leaves out at its strength.
int32_t steps_skipped(const DiffusionZRequest& request) {
    if (!request.init_image) return 0;
    const double steps = request.num_steps;
    return static_cast<int32_t>(std::max(steps - std::min(steps * decimal(request.strength), steps), 0.0));
}

int32_t steps_of(const DiffusionZRequest& request) { return request.num_steps - steps_skipped(request); }

}  // namespace

Engine::Engine(const std::filesystem::path& path, Placement placement) {
    const c10::InferenceMode inference;
    model_ = Model::load(path, placement);
}

void Engine::check(const DiffusionZRequest& request) const {
    const int64_t multiple = model_->size_multiple();
    const auto check_side = [&](const char* name, int32_t side, int64_t side_max) {
        if (side < multiple || side > side_max || side % multiple != 0) {
            fail(DIFFUSIONZ_E_ARGUMENT, name, " is ", side, "; it must be a multiple of ", multiple, " from ", multiple, " to ",
                 side_max);
        }
    };
    if (!request.prompt) fail(DIFFUSIONZ_E_ARGUMENT, "prompt is NULL; it must be UTF-8 text");
    check_side("width", request.width, model_->width_max());
    check_side("height", request.height, model_->height_max());
    // The pixels' length is an int32_t in DiffusionZResult.
    if (int64_t{3} * request.width * request.height > INT32_MAX)
        fail(DIFFUSIONZ_E_ARGUMENT, request.width, " x ", request.height, " pixels are over the limit of 2^31 bytes");
    if (request.num_steps < 1 || request.num_steps > kStepsMax)
        fail(DIFFUSIONZ_E_ARGUMENT, "num_steps is ", request.num_steps, "; it must be from 1 to ", kStepsMax);
    const auto check_number = [](const char* name, float value, float min, float max) {
        if (!(value >= min && value <= max))
            fail(DIFFUSIONZ_E_ARGUMENT, name, " is ", value, "; it must be from ", min, " to ", max);
    };
    check_number("guidance_scale", request.guidance_scale, 0, 1000);
    check_number("cfg_normalization", request.cfg_normalization, 0, 1000);
    check_number("cfg_truncation", request.cfg_truncation, 0, 1000);
    if (request.lora_path) check_number("lora_weight", request.lora_weight, -1000, 1000);
    if (request.init_image) {
        if (!(request.strength > 0 && request.strength <= 1))
            fail(DIFFUSIONZ_E_ARGUMENT, "strength is ", request.strength, "; it must be over 0 and at most 1");
        if (!model_->vae().has_encoder())
            fail(DIFFUSIONZ_E_ARGUMENT, "image to image needs the VAE's encoder, and this model has none");
    }
    if (request.format < DIFFUSIONZ_FORMAT_WEBP || request.format > DIFFUSIONZ_FORMAT_RGB)
        fail(DIFFUSIONZ_E_ARGUMENT, "format is ", request.format, "; it must be DIFFUSIONZ_FORMAT_* (0 to 3)");
    if (request.quality < 0 || request.quality > 100)
        fail(DIFFUSIONZ_E_ARGUMENT, "quality is ", request.quality, "; it must be from 0 to 100");
    if (model_->placement().device.is_cpu()) {
        // The kernel promises memory that it does not have and ends the process that uses it: so it is asked before.
        const int64_t needed = model_->vae().decode_nbytes(request.height, request.width), free = host_free_memory();
        if (needed > free) {
            fail(DIFFUSIONZ_E_OUT_OF_MEMORY, "a picture of ", request.width, " x ", request.height, " needs about ", needed >> 20,
                 " MiB to decode; the host has ", free >> 20, " MiB free");
        }
    }
    // Also finds text that is no UTF-8.
    model_->tokenizer().encode(request.prompt, kPromptTokensMax);
    if (request.negative_prompt) model_->tokenizer().encode(request.negative_prompt, kPromptTokensMax);
}

std::vector<Picture> Engine::generate(const std::vector<DiffusionZRequest>& requests, Task& task) {
    const CallQueue::Turn turn(queue_, &task);
    const c10::InferenceMode inference;
    int32_t steps = 0;
    for (const DiffusionZRequest& request : requests) steps += steps_of(request);
    task.set_step_count(steps);
    std::vector<Picture> pictures;
    for (const DiffusionZRequest& request : requests) {
        pictures.push_back(draw(request, task));
        task.add_image();
    }
    return pictures;
}

Picture Engine::draw(const DiffusionZRequest& request, Task& task) {
    task.enter(DIFFUSIONZ_STAGE_TEXT);
    task.check();
    const std::optional<LoraPairs> pairs = lora_pairs(request);
    const LoraPairs* lora = pairs ? &*pairs : nullptr;
    const at::Tensor positive = caption(request.prompt, lora);
    const at::Tensor negative =
        request.guidance_scale > 0 ? caption(request.negative_prompt ? request.negative_prompt : "", lora) : at::Tensor();
    std::vector<float> sigmas = sigmas_of(*model_, request);
    at::Tensor latents = start(request, sigmas);
    task.enter(DIFFUSIONZ_STAGE_DENOISE);
    latents = denoise(request, std::move(latents), sigmas, positive, negative, lora, task);
    task.enter(DIFFUSIONZ_STAGE_DECODE);
    task.check();
    return {model_->vae().decode(latents).squeeze(0)};
}

at::Tensor Engine::caption(const char* prompt, const LoraPairs* lora) const {
    const auto ids = model_->tokenizer().encode(chat_form(prompt), kPromptTokensMax);
    return model_->transformer().refine_caption(model_->text_encoder().encode(ids), lora);
}

at::Tensor Engine::start(const DiffusionZRequest& request, std::vector<float>& sigmas) const {
    const int64_t scale = model_->vae().config().scale();
    const std::vector<int64_t> shape = {1, model_->vae().config().latent_channels, request.height / scale, request.width / scale};
    // The CPU's generator on every device: the same seed is the same picture anywhere, and diffusers' with a CPU generator.
    auto generator = at::detail::createCPUGenerator(static_cast<uint64_t>(request.seed));
    const auto normal = [&] {
        return at::randn(shape, generator, at::TensorOptions().dtype(at::kFloat)).to(model_->placement().device);
    };
    if (!request.init_image) return normal();
    // The reference draws the posterior's sample before the noise.
    const at::Tensor posterior_noise = normal(), noise = normal();
    const at::Tensor pixels = at::from_blob(const_cast<uint8_t*>(request.init_image), {request.height, request.width, 3},
                                            at::TensorOptions().dtype(at::kByte));
    const at::Tensor image = model_->vae().encode(pixels, posterior_noise);
    sigmas.erase(sigmas.begin(), sigmas.begin() + steps_skipped(request));
    return noise * sigmas.front() + image * (1.0f - sigmas.front());
}

at::Tensor Engine::denoise(const DiffusionZRequest& request, at::Tensor latents, const std::vector<float>& sigmas,
                           const at::Tensor& positive, const at::Tensor& negative, const LoraPairs* lora, Task& task) const {
    const Transformer& transformer = model_->transformer();
    const auto positions = [&](const at::Tensor& caption) {
        return transformer.positions(latents.size(2), latents.size(3), caption.size(1));
    };
    const Transformer::Positions positive_positions = positions(positive);
    const bool guided = negative.defined();
    const bool one_call = guided && negative.size(1) == positive.size(1);
    const at::Tensor both = one_call ? at::cat({positive, negative}) : at::Tensor();
    const Transformer::Positions negative_positions = guided && !one_call ? positions(negative) : positive_positions;

    if (latents_watcher_) latents_watcher_(latents);
    for (size_t step = 0; step + 1 < sigmas.size(); ++step) {
        task.check();
        const float time = time_of_sigma(model_->scheduler(), sigmas[step]);
        at::Tensor prediction;
        if (guided && !(static_cast<double>(time) > decimal(request.cfg_truncation))) {
            at::Tensor with, without;
            if (one_call) {
                const at::Tensor out = transformer.forward(latents.expand({2, -1, -1, -1}), time, both, positive_positions, lora);
                with = out.narrow(0, 0, 1), without = out.narrow(0, 1, 1);
            } else {
                with = transformer.forward(latents, time, positive, positive_positions, lora);
                without = transformer.forward(latents, time, negative, negative_positions, lora);
            }
            prediction = with + (with - without) * request.guidance_scale;
            if (request.cfg_normalization > 0) {
                const at::Tensor norm_max = at::linalg_vector_norm(with) * request.cfg_normalization,
                                 norm = at::linalg_vector_norm(prediction);
                prediction = prediction * at::where(norm > norm_max, norm_max / norm, at::ones_like(norm));
            }
        } else {
            prediction = transformer.forward(latents, time, positive, positive_positions, lora);
        }
        // The model predicts the way from noise to image; an Euler step walks it by the fall of sigma.
        latents = latents - prediction * (sigmas[step + 1] - sigmas[step]);
        task.add_steps(1);
        if (latents_watcher_) latents_watcher_(latents);
    }
    return latents;
}

std::shared_ptr<const LoraAdapter> Engine::read_lora(const std::filesystem::path& path) const {
    return std::make_shared<const LoraAdapter>(path, model_->transformer(), model_->placement());
}

std::optional<LoraPairs> Engine::lora_pairs(const DiffusionZRequest& request) {
    LoraPairs pairs;
    for (const LoadedLora& lora : loras_) lora.adapter->add_to(pairs, lora.weight);
    if (request.lora_path) {
        const bool same = call_lora_ && call_lora_->path() == request.lora_path && call_lora_->is_current();
        if (!same) call_lora_ = read_lora(request.lora_path);
        call_lora_->add_to(pairs, request.lora_weight);
    } else {
        call_lora_.reset();
    }
    if (pairs.empty()) return std::nullopt;
    return pairs;
}

void Engine::load_lora(const std::filesystem::path& path, double weight) {
    if (!(weight >= -1000 && weight <= 1000))
        fail(DIFFUSIONZ_E_ARGUMENT, "weight is ", weight, "; it must be from -1000 to 1000");
    const CallQueue::Turn turn(queue_);
    const c10::InferenceMode inference;
    for (LoadedLora& lora : loras_) {
        if (lora.adapter->path() == path) {
            if (!lora.adapter->is_current()) lora.adapter = read_lora(path);
            lora.weight = weight;
            return;
        }
    }
    loras_.push_back({read_lora(path), weight});
}

void Engine::unload_lora() {
    const CallQueue::Turn turn(queue_);
    loras_.clear();
    call_lora_.reset();
}

int64_t Engine::lora_bytes() {
    const CallQueue::Turn turn(queue_);
    int64_t total = call_lora_ ? static_cast<int64_t>(call_lora_->nbytes()) : 0;
    for (const LoadedLora& lora : loras_) total += static_cast<int64_t>(lora.adapter->nbytes());
    return total;
}

std::string Engine::metadata(const DiffusionZRequest& request) const {
    nlohmann::ordered_json json;
    json["prompt"] = request.prompt;
    if (request.guidance_scale > 0) json["negative_prompt"] = request.negative_prompt ? request.negative_prompt : "";
    json["width"] = request.width;
    json["height"] = request.height;
    json["steps"] = request.num_steps;
    json["guidance_scale"] = decimal(request.guidance_scale);
    if (request.guidance_scale > 0 && request.cfg_normalization > 0)
        json["cfg_normalization"] = decimal(request.cfg_normalization);
    if (request.guidance_scale > 0 && request.cfg_truncation < 1) json["cfg_truncation"] = decimal(request.cfg_truncation);
    json["seed"] = request.seed;
    if (request.init_image) json["strength"] = decimal(request.strength);
    if (request.lora_path) {
        json["lora"] = std::filesystem::path(request.lora_path).filename().string();
        json["lora_weight"] = decimal(request.lora_weight);
    }
    json["model"] = model_->path().filename().string();
    json["precision"] = model_->placement().dtype == at::kFloat ? "float32" : "bfloat16";
    json["version"] = "diffusionz " DIFFUSIONZ_VERSION;
    return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

std::string Engine::info() const {
    const TransformerConfig& transformer = model_->transformer().config();
    const TextEncoderConfig& text_encoder = model_->text_encoder().config();
    const VaeConfig& vae = model_->vae().config();
    nlohmann::ordered_json json;
    json["family"] = "zimage";
    json["path"] = model_->path().string();
    json["device"] = model_->placement().device.str();
    json["precision"] = model_->placement().dtype == at::kFloat ? "float32" : "bfloat16";
    json["weights_bytes"] = model_->nbytes();
    json["transformer"] = {{"dim", transformer.dim},
                           {"layers", transformer.num_layers},
                           {"refiner_layers", transformer.num_refiner_layers},
                           {"heads", transformer.num_heads},
                           {"kv_heads", transformer.num_kv_heads}};
    json["text_encoder"] = {
        {"hidden_size", text_encoder.hidden_size}, {"layers", text_encoder.num_layers}, {"vocab_size", text_encoder.vocab_size}};
    json["vae"] = {{"block_out_channels", vae.block_out_channels},
                   {"latent_channels", vae.latent_channels},
                   {"encoder", model_->vae().has_encoder()}};
    json["scheduler"] = {{"shift", model_->scheduler().shift},
                         {"use_dynamic_shifting", model_->scheduler().use_dynamic_shifting}};
    json["size"] = {{"default", std::max(vae.sample_size / model_->size_multiple(), int64_t{1}) * model_->size_multiple()},
                    {"multiple", model_->size_multiple()},
                    {"width_max", model_->width_max()},
                    {"height_max", model_->height_max()}};
    json["steps_max"] = kStepsMax;
    json["prompt_tokens_max"] = kPromptTokensMax;
    return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace diffusionz
