// Runs single stages of the Z-Image engine for the parity tests, which compare each with the reference.
//
//   stage_probe PLAN.json
//
// The plan: {"model": FOLDER, "precision": "float32" | "bfloat16", "inputs": FILE.safetensors, "outputs": FILE.safetensors,
// "stages": [...]}. A stage reads tensors of `inputs` by name and writes float32 tensors named by its "out":
//   {"stage": "tokens",      "prompt": TEXT, "out"}                                   ids of the chat form [tokens]
//   {"stage": "features",    "prompt": TEXT, "out"}                                   [tokens, width]
//   {"stage": "transformer", "latents": NAME [1 or n, c, h, w], "features": NAME [tokens, width], "time": T, "out"}    the
//   model's output, not negated
//   {"stage": "sigmas",      "steps": N, "width", "height", "out"}                    [N + 1]
//   {"stage": "latents",     "request": {prompt, width, height, steps, seed, guidance_scale, negative_prompt, cfg_normalization,
//   cfg_truncation, lora, lora_weight,
//                             strength, image: NAME uint8-valued [h, w, 3]}, "out"}   latents at the start and after each step
//                             [steps + 1, c, h, w]
//   {"stage": "decode",      "latents": NAME unscaled, "out"}                         [n, 3, 8h, 8w] in [-1, 1]
//   {"stage": "encode",      "image": NAME [h, w, 3], "noise": NAME, "out"}           scaled latents
//   {"stage": "time",        "latents": NAME, "features": NAME, "repeats": N, "refine": BOOL, "out"}  seconds of N transformer calls
//                            [N], after one to warm up; "refine": the caption is embedded and refined in each, as the reference does
//   {"stage": "time_decode", "latents": NAME, "repeats": N, "out"}                    seconds of N VAE decodes [N]
#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>

#include <chrono>

#include "core/json_file.h"
#include "plan_main.h"
#include "write_safetensors.h"
#include "zimage/engine.h"

using namespace diffusionz;

namespace {

template <class Call>
at::Tensor seconds_of(int64_t repeats, Call&& call) {
    call();
    std::vector<float> seconds;
    for (int64_t i = 0; i < repeats; ++i) {
        const auto begin = std::chrono::steady_clock::now();
        call();
        seconds.push_back(std::chrono::duration<float>(std::chrono::steady_clock::now() - begin).count());
    }
    return at::tensor(seconds);
}

void run(const char* plan_path) {
    const nlohmann::json plan = JsonFile::load(plan_path).object();
    const c10::InferenceMode inference;
    const auto dtype = plan.value("precision", "float32") == "bfloat16" ? at::kBFloat16 : at::kFloat;
    Engine engine(plan.at("model").get<std::string>(), {at::kCPU, dtype});
    const Model& model = engine.model();
    std::shared_ptr<const Checkpoint> inputs;
    if (plan.contains("inputs"))
        inputs = std::make_shared<const Checkpoint>(Checkpoint::from_file(plan["inputs"].get<std::string>()));
    const auto input = [&](const nlohmann::json& stage, const char* key) {
        const std::string name = stage.at(key);
        return as_tensor(inputs->at(name), inputs, name, DIFFUSIONZ_E_ARGUMENT).to(at::kFloat);
    };
    const auto ids_of = [&](const nlohmann::json& stage) {
        return model.tokenizer().encode(chat_form(stage.at("prompt").get<std::string>()), 512);
    };

    std::vector<std::pair<std::string, at::Tensor>> outputs;
    for (const auto& stage : plan.at("stages")) {
        const std::string kind = stage.at("stage");
        at::Tensor out;
        if (kind == "tokens") {
            out = at::tensor(ids_of(stage), at::kInt);
        } else if (kind == "features") {
            out = model.text_encoder().encode(ids_of(stage));
        } else if (kind == "transformer" || kind == "time") {
            const at::Tensor latents = input(stage, "latents"), features = input(stage, "features").to(dtype);
            const at::Tensor caption = model.transformer().refine_caption(features, nullptr).expand({latents.size(0), -1, -1});
            const auto positions = model.transformer().positions(latents.size(2), latents.size(3), caption.size(1));
            const auto call = [&] {
                if (stage.value("refine", false)) {
                    const at::Tensor refined = model.transformer().refine_caption(features, nullptr).expand_as(caption);
                    return model.transformer().forward(latents, stage.value("time", 0.5f), refined, positions, nullptr);
                }
                return model.transformer().forward(latents, stage.value("time", 0.5f), caption, positions, nullptr);
            };
            out = kind == "time" ? seconds_of(stage.at("repeats"), call) : call();
        } else if (kind == "sigmas") {
            const int64_t multiple = model.size_multiple();
            out = at::tensor(
                make_sigmas(model.scheduler(), stage.at("steps"),
                            stage.at("width").get<int64_t>() / multiple * (stage.at("height").get<int64_t>() / multiple)));
        } else if (kind == "latents") {
            const auto& asked = stage.at("request");
            const std::string prompt = asked.at("prompt"), negative = asked.value("negative_prompt", ""),
                              lora = asked.value("lora", "");
            DiffusionZRequest request{};
            request.prompt = prompt.c_str();
            request.negative_prompt = negative.c_str();
            request.width = asked.at("width");
            request.height = asked.at("height");
            request.num_steps = asked.at("steps");
            request.seed = asked.at("seed");
            request.guidance_scale = asked.value("guidance_scale", 0.0f);
            request.cfg_normalization = asked.value("cfg_normalization", 0.0f);
            request.cfg_truncation = asked.value("cfg_truncation", 1.0f);
            request.lora_path = lora.empty() ? nullptr : lora.c_str();
            request.lora_weight = asked.value("lora_weight", 1.0f);
            request.strength = asked.value("strength", 0.6f);
            at::Tensor image;
            if (asked.contains("image")) {
                image = input(asked, "image").to(at::kByte).contiguous();
                request.init_image = image.const_data_ptr<uint8_t>();
            }
            engine.check(request);
            std::vector<at::Tensor> steps;
            engine.watch_latents([&](const at::Tensor& latents) { steps.push_back(latents); });
            Task task;
            engine.draw(request, task);
            out = at::cat(steps);
        } else if (kind == "decode" || kind == "time_decode") {
            const at::Tensor latents = input(stage, "latents");
            const auto call = [&] { return model.vae()->decode_raw(latents); };
            out = kind == "time_decode" ? seconds_of(stage.at("repeats"), call) : call();
        } else if (kind == "encode") {
            out = model.vae()->encode(input(stage, "image").to(at::kByte), input(stage, "noise"));
        } else {
            fail(DIFFUSIONZ_E_ARGUMENT, "unknown stage '", kind, "'");
        }
        outputs.emplace_back(stage.at("out").get<std::string>(), out.to(at::kFloat).contiguous());
    }
    write_safetensors(plan.at("outputs").get<std::string>(), outputs);
}

}  // namespace

int main(int argc, char** argv) { return plan_main("stage_probe", argc, argv, run); }
