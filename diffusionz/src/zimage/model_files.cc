#include "zimage/model_files.h"

#include <algorithm>
#include <regex>

#include "core/error.h"

namespace diffusionz {
namespace fs = std::filesystem;
namespace {

void replace_all(std::string& text, const std::string& from, const std::string& to) {
    for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size()))
        text.replace(at, from.size(), to);
}

// The original's names (Tongyi-MAI/Z-Image, ComfyUI) to diffusers'; a checkpoint that has diffusers' is left as it is.
void rename_transformer(Checkpoint& checkpoint) {
    checkpoint.strip_prefix("model.diffusion_model.");
    if (!checkpoint.has("x_embedder.weight")) return;
    checkpoint.rename([](std::string name) {
        if (name == "norm_final.weight") return std::string();  // a leftover of training that the model does not use
        if (name.rfind("x_embedder.", 0) == 0) return "all_x_embedder.2-1." + name.substr(11);
        if (name.rfind("final_layer.", 0) == 0) return "all_final_layer.2-1." + name.substr(12);
        replace_all(name, ".attention.out.", ".attention.to_out.0.");
        replace_all(name, ".attention.q_norm.", ".attention.norm_q.");
        replace_all(name, ".attention.k_norm.", ".attention.norm_k.");
        return name;
    });
    // One product holds queries, keys and values in its rows: name each part.
    std::vector<std::string> fused;
    for (const auto& [name, view] : checkpoint.tensors()) {
        if (name.ends_with(".attention.qkv.weight") && view.shape.size() == 2) fused.push_back(name);
    }
    for (const std::string& name : fused) {
        const TensorView view = checkpoint.at(name);
        const std::string stem = name.substr(0, name.size() - std::string("qkv.weight").size());
        const int64_t heads = view.shape[1], keys = (view.shape[0] - heads) / 2;
        if (keys <= 0 || heads + 2 * keys != view.shape[0])
            fail(DIFFUSIONZ_E_MODEL, checkpoint.name(), ": tensor '", name, "' is ", shape_text(view.shape),
                 ", no fused query, key and value");
        checkpoint.insert(stem + "to_q.weight", view.rows(0, heads));
        checkpoint.insert(stem + "to_k.weight", view.rows(heads, keys));
        checkpoint.insert(stem + "to_v.weight", view.rows(heads + keys, keys));
        checkpoint.erase(name);
    }
}

// The names of the original autoencoder (CompVis, Flux' ae.safetensors) to diffusers'.
void rename_vae(Checkpoint& checkpoint) {
    checkpoint.strip_prefix("vae.");
    checkpoint.strip_prefix("first_stage_model.");
    if (!checkpoint.has("decoder.mid.block_1.conv1.weight")) return;
    int levels = 0;
    while (checkpoint.has(concat("decoder.up.", levels, ".block.0.conv1.weight"))) ++levels;
    checkpoint.rename([levels](std::string name) {
        static const std::regex level("^(encoder|decoder)\\.(down|up)\\.(\\d{1,3})\\.");
        std::smatch match;
        if (std::regex_search(name, match, level)) {
            const bool up = match[2] == "up";
            // The original numbers the decoder's levels by resolution, diffusers by order of use.
            const int index = up ? levels - 1 - std::stoi(match[3]) : std::stoi(match[3]);
            name = concat(match[1].str(), up ? ".up_blocks." : ".down_blocks.", index, '.', match.suffix().str());
            replace_all(name, ".block.", ".resnets.");
            replace_all(name, ".upsample.conv.", ".upsamplers.0.conv.");
            replace_all(name, ".downsample.conv.", ".downsamplers.0.conv.");
        }
        replace_all(name, ".nin_shortcut.", ".conv_shortcut.");
        replace_all(name, ".mid.block_1.", ".mid_block.resnets.0.");
        replace_all(name, ".mid.block_2.", ".mid_block.resnets.1.");
        if (name.find(".mid.attn_1.") != std::string::npos) {
            replace_all(name, ".mid.attn_1.", ".mid_block.attentions.0.");
            replace_all(name, ".attentions.0.norm.", ".attentions.0.group_norm.");
            replace_all(name, ".attentions.0.q.", ".attentions.0.to_q.");
            replace_all(name, ".attentions.0.k.", ".attentions.0.to_k.");
            replace_all(name, ".attentions.0.v.", ".attentions.0.to_v.");
            replace_all(name, ".attentions.0.proj_out.", ".attentions.0.to_out.0.");
        }
        replace_all(name, ".norm_out.", ".conv_norm_out.");
        return name;
    });
    // Its attention is written as 1x1 convolutions.
    std::vector<std::string> attention;
    for (const auto& [name, view] : checkpoint.tensors()) {
        const bool one_by_one = view.shape.size() == 4 && view.shape[2] == 1 && view.shape[3] == 1;
        if (name.find(".attentions.0.to_") != std::string::npos && one_by_one) attention.push_back(name);
    }
    for (const std::string& name : attention) {
        TensorView view = checkpoint.at(name);
        view.shape.resize(2);
        checkpoint.insert(name, view);
    }
}

void rename_text_encoder(Checkpoint& checkpoint) { checkpoint.strip_prefix("model."); }

// The first of `names` that is a folder in `root`; the first name when none is.
fs::path folder_of(const fs::path& root, std::initializer_list<const char*> names) {
    for (const char* name : names) {
        if (fs::is_directory(root / name)) return root / name;
    }
    return root / *names.begin();
}

template <class Config>
Config config_of(const fs::path& folder, const Checkpoint& checkpoint) {
    const fs::path json = folder / "config.json";
    return fs::exists(json) ? Config::from_json(JsonFile::load(json)) : Config::from_shapes(checkpoint);
}

}  // namespace

fs::path find_tokenizer(const fs::path& root) {
    for (const fs::path& candidate : {root / "tokenizer" / "tokenizer.json", root / "tokenizer.json"}) {
        if (fs::exists(candidate)) return candidate;
    }
    return {};
}

ModelFiles find_model_files(const fs::path& path) {
    ModelFiles files;
    const bool one_file = fs::is_regular_file(path);
    if (!one_file && !fs::is_directory(path)) fail(DIFFUSIONZ_E_MODEL, path.string(), ": no such folder or file");
    const fs::path root = one_file ? path.parent_path() : path;

    fs::path text_encoder, transformer, vae;  // where their config.json would be
    if (one_file) {
        if (path.extension() != ".safetensors")
            fail(DIFFUSIONZ_E_MODEL, path.string(), ": a model is a folder or a .safetensors file");
        files.transformer = std::make_shared<Checkpoint>(Checkpoint::from_file(path, "model.diffusion_model."));
        files.vae = std::make_shared<Checkpoint>(Checkpoint::from_file(path, "vae."));
        files.text_encoder = std::make_shared<Checkpoint>(Checkpoint::from_file(path, "text_encoders."));
        // ComfyUI puts the encoder's own name in between: text_encoders.qwen3_4b.transformer.model.layers...
        files.text_encoder->rename([](const std::string& name) {
            const size_t at = name.find(".transformer.");
            return at == std::string::npos ? name : name.substr(at + std::string(".transformer.").size());
        });
        text_encoder = transformer = vae = root / "no config beside a single file";
        if (files.transformer->tensors().empty())
            fail(DIFFUSIONZ_E_MODEL, path.string(),
                 ": no tensor begins with model.diffusion_model.; a model in one file has all components");
    } else {
        if (fs::exists(root / "config.json") && JsonFile::load(root / "config.json").has("chronos_config"))
            fail(DIFFUSIONZ_E_MODEL, path.string(), ": this is a model that forecasts: chronos_init loads it");
        if (fs::exists(root / "model_index.json")) {
            const std::string pipeline = JsonFile::load(root / "model_index.json").text("_class_name", "");
            if (pipeline.rfind("ZImage", 0) != 0)
                fail(DIFFUSIONZ_E_MODEL, (root / "model_index.json").string(), ": _class_name is '", pipeline,
                     "'; it must be ZImagePipeline");
        }
        transformer = folder_of(root, {"transformer", "diffusion_models", "unet"});
        text_encoder = folder_of(root, {"text_encoder", "text_encoders", "clip"});
        vae = folder_of(root, {"vae"});
        files.transformer = std::make_shared<Checkpoint>(Checkpoint::from_folder(transformer));
        files.text_encoder = std::make_shared<Checkpoint>(Checkpoint::from_folder(text_encoder));
        files.vae = std::make_shared<Checkpoint>(Checkpoint::from_folder(vae));
    }
    rename_transformer(*files.transformer);
    rename_text_encoder(*files.text_encoder);
    rename_vae(*files.vae);

    files.tokenizer_json = find_tokenizer(root);
    if (files.tokenizer_json.empty())
        fail(DIFFUSIONZ_E_MODEL, root.string(), ": neither tokenizer/tokenizer.json nor tokenizer.json is there");
    files.transformer_config = config_of<TransformerConfig>(transformer, *files.transformer);
    files.text_encoder_config = config_of<TextEncoderConfig>(text_encoder, *files.text_encoder);
    files.vae_config = config_of<VaeConfig>(vae, *files.vae);
    const fs::path scheduler = root / "scheduler" / "scheduler_config.json";
    if (fs::exists(scheduler)) files.scheduler_config = SchedulerConfig::from_json(JsonFile::load(scheduler));

    if (files.transformer_config.caption_dim != files.text_encoder_config.hidden_size) {
        fail(DIFFUSIONZ_E_MODEL, path.string(), ": the transformer reads captions of width ",
             files.transformer_config.caption_dim, ", the text encoder writes ", files.text_encoder_config.hidden_size,
             ": they belong to different models");
    }
    if (files.transformer_config.in_channels != files.vae_config.latent_channels) {
        fail(DIFFUSIONZ_E_MODEL, path.string(), ": the transformer has ", files.transformer_config.in_channels,
             " channels, the VAE ", files.vae_config.latent_channels, ": they belong to different models");
    }
    return files;
}

}  // namespace diffusionz
