#include "zimage/engine.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/device.h"
#include "core/error.h"
#include "core/unicode.h"
#include "ops/disabled.h"
#include "zimage/previews.h"

namespace diffusionz {
namespace {

constexpr size_t kPromptTokensMax = static_cast<size_t>(TextEncoder::kTokensMax);
constexpr int32_t kStepsMax = 1000;
constexpr size_t kFeaturesMax = 16;  // prompts whose features are kept: variations of one prompt encode it once

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
    const double left_out = std::max(steps - std::min(steps * decimal(request.strength), steps), 0.0);
    // A strength over 0 changes the picture, however it is rounded.
    return std::min(static_cast<int32_t>(left_out), request.num_steps - 1);
}

// A copy on the host, when the stream has come to it.
at::Tensor to_host(const at::Tensor& pixels, const WorkStream& stream) {
    if (pixels.is_cpu()) return pixels;
    const at::Tensor host = at::empty(pixels.sizes(), at::TensorOptions().dtype(pixels.scalar_type()).pinned_memory(true));
    host.copy_(pixels, /*non_blocking=*/true);
    stream.synchronize();
    return host;
}

}  // namespace

Engine::Engine(const std::filesystem::path& path, Placement placement, bool cuda_graphs, int64_t max_vram_bytes)
    : model_([&] {
          const c10::InferenceMode inference;
          return Model::load(path, placement, max_vram_bytes);
      }()),
      stream_(placement.device),
      // Where not even the VAE can stay there is no room for what graphs keep.
      graphs_(placement.device,
              cuda_graphs && model_->residence().vae && !kernel_disabled("graphs") && !trace_from_environment()),
      sampler_(model_->transformer(), stream_, graphs_, trace_from_environment()) {
    synchronize(placement.device);  // the weights came on another stream
    release_kept_memory();          // what they went through on their way
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
        if (!model_->has_vae_encoder())
            fail(DIFFUSIONZ_E_ARGUMENT, "image to image needs the VAE's encoder, and this model has none");
    }
    if (request.format < DIFFUSIONZ_FORMAT_WEBP || request.format > DIFFUSIONZ_FORMAT_RGB)
        fail(DIFFUSIONZ_E_ARGUMENT, "format is ", request.format, "; it must be DIFFUSIONZ_FORMAT_* (0 to 3)");
    if (request.quality < 0 || request.quality > 100)
        fail(DIFFUSIONZ_E_ARGUMENT, "quality is ", request.quality, "; it must be from 0 to 100");
    if (model_->placement().device.is_cpu()) {
        // The kernel promises memory that it does not have and ends the process that uses it: so it is asked before.
        const int64_t needed = model_->vae()->decode_nbytes(request.height, request.width), free = host_free_memory();
        if (needed > free) {
            fail(DIFFUSIONZ_E_OUT_OF_MEMORY, "a picture of ", request.width, " x ", request.height, " needs about ", needed >> 20,
                 " MiB to decode; the host has ", free >> 20, " MiB free");
        }
    }
    check_utf8(request.prompt);
    if (request.negative_prompt) check_utf8(request.negative_prompt);
}

int32_t Engine::steps_of(const DiffusionZRequest& request) { return request.num_steps - steps_skipped(request); }

void Engine::forget_graphs() {
    const std::lock_guard alone(mutex_);
    graphs_.clear();
}

Picture Engine::draw(const DiffusionZRequest& request, Task& task, int32_t image) {
    const std::lock_guard alone(mutex_);
    const c10::InferenceMode inference;
    const WorkStream::Scope scope(stream_);
    const at::NoTF32Guard float32_is_float32;  // forecasts in TF32 switch it on for the whole process
    task.enter(DIFFUSIONZ_STAGE_TEXT);
    task.check();
    const Sampler::Lora lora = lora_of(request);
    const Sampler::Guidance guidance{request.guidance_scale, request.cfg_normalization, decimal(request.cfg_truncation)};
    const at::Tensor positive = features(request.prompt);
    const at::Tensor negative =
        guidance.scale > 0 ? features(request.negative_prompt ? request.negative_prompt : "") : at::Tensor();
    // The noise is drawn on the host while the device encodes the text.
    std::vector<float> sigmas = sigmas_of(*model_, request);
    at::Tensor latents = start(request, sigmas);
    const Transformer& transformer = model_->transformer();
    Sampler::Captions captions{transformer.refine_caption(positive, lora.pairs), {}};
    if (negative.defined()) captions.negative = transformer.refine_caption(negative, lora.pairs);
    task.enter(DIFFUSIONZ_STAGE_DENOISE);
    std::vector<float> times;
    for (size_t i = 0; i + 1 < sigmas.size(); ++i) times.push_back(time_of_sigma(model_->scheduler(), sigmas[i]));
    std::function<void(const at::Tensor&)> watch = latents_watcher_;
    Previews previews(task, image, sigmas, [this](const at::Tensor& coarse) { return decode_if_it_fits(coarse); });
    if (previews.count() > 0) {
        watch = [&](const at::Tensor& now) {
            if (latents_watcher_) latents_watcher_(now);
            previews.see(now);
        };
    }
    latents = sampler_.run(std::move(latents), sigmas, times, captions, guidance, lora, task, watch);
    task.enter(DIFFUSIONZ_STAGE_DECODE);
    task.check();
    return {decode(latents)};
}

at::Tensor Engine::decode(const at::Tensor& latents) {
    const std::shared_ptr<const Vae> vae = model_->vae();
    const GraphCache::Function decode = [&vae = *vae](const std::vector<at::Tensor>& inputs) {
        return vae.decode_on_device(inputs[0]);
    };
    // A graph has the addresses of weights in it, so only weights that stay can be in one.
    const at::Tensor pixels =
        model_->residence().vae ? graphs_.run("decode", {latents}, [&] { return decode; }) : decode({latents});
    return to_host(pixels, stream_).squeeze(0);
}

at::Tensor Engine::decode_if_it_fits(const at::Tensor& latents) {
    const int64_t scale = model_->vae_config().scale();
    const bool fits =
        !latents.is_cpu() || model_->vae()->decode_nbytes(latents.size(2) * scale, latents.size(3) * scale) <= host_free_memory();
    return fits ? decode(latents) : at::Tensor();
}

at::Tensor Engine::features(const char* prompt) {
    const std::vector<int32_t> ids = model_->tokenizer().encode(chat_form(prompt), kPromptTokensMax);
    const auto known = std::find_if(features_.begin(), features_.end(), [&](const auto& entry) { return entry.first == ids; });
    if (known != features_.end()) {
        features_.splice(features_.begin(), features_, known);
        return known->second;
    }
    const TextEncoder& encoder = model_->text_encoder();
    const at::Tensor embedded = encoder.embed(ids).to(model_->placement().device);
    const GraphCache::Function encode = [&encoder](const std::vector<at::Tensor>& inputs) { return encoder.forward(inputs[0]); };
    const at::Tensor padded =
        model_->residence().text_encoder ? graphs_.run("text", {embedded}, [&] { return encode; }) : encode({embedded});
    if (features_.size() == kFeaturesMax) features_.pop_back();
    features_.emplace_front(ids, padded.narrow(0, 0, static_cast<int64_t>(ids.size())).clone());
    return features_.front().second;
}

at::Tensor Engine::start(const DiffusionZRequest& request, std::vector<float>& sigmas) const {
    const int64_t scale = model_->vae_config().scale();
    const std::vector<int64_t> shape = {1, model_->vae_config().latent_channels, request.height / scale, request.width / scale};
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
    const std::shared_ptr<const Vae> vae = model_->vae();
    const at::Tensor image = vae->encode(pixels, posterior_noise);
    if (!model_->residence().vae) stream_.synchronize();  // before its weights go
    sigmas.erase(sigmas.begin(), sigmas.begin() + steps_skipped(request));
    return noise * sigmas.front() + image * (1.0f - sigmas.front());
}

std::shared_ptr<const LoraAdapter> Engine::read_lora(const std::filesystem::path& path) const {
    return std::make_shared<const LoraAdapter>(path, model_->transformer(), model_->placement());
}

Sampler::Lora Engine::lora_of(const DiffusionZRequest& request) {
    std::vector<LoadedLora> active = loras_;
    if (request.lora_path) {
        const bool same = call_lora_ && call_lora_->path() == request.lora_path && call_lora_->is_current();
        if (!same) call_lora_ = read_lora(request.lora_path);
        active.push_back({call_lora_, request.lora_weight});
    } else {
        call_lora_.reset();
    }
    pairs_.clear();
    if (active.empty()) return {};
    for (const LoadedLora& lora : active) lora.adapter->add_to(pairs_, lora.weight);
    if (model_->placement().device.is_cpu()) return {&pairs_, ""};
    // Recorded steps read the bank's buffers: an adapter of the same shape only changes what is in them.
    if (!lora_bank_ || !lora_bank_->fits(pairs_)) {
        lora_bank_.emplace(pairs_);
        ++lora_bank_number_;
    } else if (active != active_loras_) {
        lora_bank_->load(pairs_);
    }
    active_loras_ = std::move(active);
    return {&lora_bank_->pairs(), concat("lora ", lora_bank_number_)};
}

void Engine::load_lora(const std::filesystem::path& path, double weight) {
    if (!(weight >= -1000 && weight <= 1000))
        fail(DIFFUSIONZ_E_ARGUMENT, "weight is ", weight, "; it must be from -1000 to 1000");
    const std::lock_guard alone(mutex_);
    const c10::InferenceMode inference;
    const WorkStream::Scope scope(stream_);
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
    const std::lock_guard alone(mutex_);
    loras_.clear();
    call_lora_.reset();
    pairs_.clear();
    active_loras_.clear();
    lora_bank_.reset();
}

int64_t Engine::lora_bytes() {
    const std::lock_guard alone(mutex_);
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
    json["precision"] = precision_name(model_->placement());
    json["version"] = "diffusionz " DIFFUSIONZ_VERSION;
    return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

std::string Engine::info() const {
    const TransformerConfig& transformer = model_->transformer().config();
    const TextEncoderConfig& text_encoder = model_->text_encoder().config();
    const VaeConfig& vae = model_->vae_config();
    nlohmann::ordered_json json;
    json["family"] = "zimage";
    json["path"] = model_->path().string();
    json["device"] = model_->placement().device.str();
    json["precision"] = precision_name(model_->placement());
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
                   {"encoder", model_->has_vae_encoder()}};
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
