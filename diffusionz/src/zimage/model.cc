#include "zimage/model.h"

#include <algorithm>

#include "core/device.h"
#include "core/model_cache.h"

namespace diffusionz {
namespace fs = std::filesystem;
namespace {

// What a large picture works in beside the weights, about; small ones get by with the lesser number.
constexpr int64_t kWorkBytes = int64_t{2} << 30, kWorkBytesMin = int64_t{256} << 20;

// Bytes that the tensors of `checkpoint` have on the device; of those whose name begins with `prefix`.
int64_t device_nbytes(const Checkpoint& checkpoint, const Placement& placement, const std::string& prefix = "") {
    int64_t total = 0;
    for (const auto& [name, view] : checkpoint.tensors()) {
        if (name.rfind(prefix, 0) != 0) continue;
        int64_t count = 1;
        for (const int64_t size : view.shape) count *= size;
        const bool fp8 = placement.products == Products::fp8 && name.rfind("layers.", 0) == 0 && view.shape.size() == 2 &&
                         name.find("adaLN") == std::string::npos;
        total += count * (fp8 ? 1 : static_cast<int64_t>(at::elementSize(placement.dtype)));
    }
    return total;
}

// The most that stays in max_vram_bytes. Fails with E_OUT_OF_MEMORY.
Residence residence_in(const ModelFiles& files, const Placement& placement, int64_t max_vram_bytes) {
    if (max_vram_bytes == 0 || placement.device.is_cpu()) return {};
    const int64_t transformer = device_nbytes(*files.transformer, placement), vae = device_nbytes(*files.vae, placement);
    const Placement plain{placement.device, placement.dtype};
    const int64_t text_layer = device_nbytes(*files.text_encoder, plain, "layers.0."),
                  text_encoder = text_layer * (files.text_encoder_config.num_layers - 1);
    const int64_t needed = transformer + std::max(2 * text_layer, vae) + kWorkBytesMin;
    if (max_vram_bytes < needed) {
        fail(DIFFUSIONZ_E_OUT_OF_MEMORY, "max_vram_bytes is ", max_vram_bytes, " (", max_vram_bytes >> 20, " MiB); in ",
             precision_name(placement), " this model needs ", needed >> 20, " MiB at least, ", transformer >> 20,
             " of them for its transformer");
    }
    Residence residence;
    residence.text_encoder = transformer + text_encoder + vae + kWorkBytes <= max_vram_bytes;
    residence.vae = transformer + vae + 2 * text_layer + kWorkBytes <= max_vram_bytes;
    return residence;
}

}  // namespace

Model::Model(const fs::path& path, const ModelFiles& files, Placement placement, Residence residence)
    : path_(path),
      placement_(placement),
      residence_(residence),
      tokenizer_(Tokenizer::from_file(files.tokenizer_json)),
      transformer_(files.transformer_config, Weights(files.transformer, placement)),
      text_encoder_(files.text_encoder_config, Weights(files.text_encoder, placement), !residence.text_encoder),
      vae_config_(files.vae_config),
      resident_vae_(std::make_shared<const Vae>(vae_config_, Weights(files.vae, placement))),
      has_vae_encoder_(resident_vae_->has_encoder()),
      scheduler_(files.scheduler_config) {
    if (residence.vae) return;
    vae_weights_.emplace(files.vae, placement);
    resident_vae_.reset();
}

std::shared_ptr<const Model> Model::load(const fs::path& path, Placement placement, int64_t max_vram_bytes) {
    static ModelCache<Model> cache;
    std::string key = model_key(path, placement);
    fs::path canonical = fs::canonical(path);
    if (fs::is_regular_file(canonical)) {
        // The name that was given, which may be a link (as in a hub's cache): the tokenizer stands beside it.
        canonical = fs::canonical(fs::absolute(path).parent_path()) / path.filename();
        const fs::path tokenizer = find_tokenizer(canonical.parent_path());
        if (!tokenizer.empty()) key += model_key(tokenizer, placement);
    }
    const Residence residence =
        max_vram_bytes > 0 ? residence_in(find_model_files(canonical), placement, max_vram_bytes) : Residence{};
    key += concat("residence ", residence.text_encoder, residence.vae);
    return cache.get(key,
                     [&] { return std::make_shared<const Model>(canonical, find_model_files(canonical), placement, residence); });
}

std::shared_ptr<const Vae> Model::vae() const {
    if (resident_vae_) return resident_vae_;
    const std::lock_guard lock(vae_mutex_);
    std::shared_ptr<const Vae> vae = visiting_vae_.lock();
    if (!vae) {
        visiting_vae_ = vae = std::make_shared<const Vae>(vae_config_, *vae_weights_);
        synchronize(placement_.device);  // a second holder works on another stream
    }
    return vae;
}

size_t Model::nbytes() const {
    return text_encoder_.nbytes() + transformer_.nbytes() + (resident_vae_ ? resident_vae_->nbytes() : 0);
}

}  // namespace diffusionz
