#include "zimage/lora.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <map>
#include <memory>
#include <set>

#include "core/error.h"
#include "core/peft_scale.h"

namespace diffusionz {
namespace {

constexpr double kMatchShareMin = 0.95;

enum class Role { down, up, alpha };

struct Key {
    std::string name;    // the module's, as the file has it
    std::string module;  // the same flattened: dots are underscores
    Role role;
};

// Trainers write one module with dots (PEFT), with underscores (kohya) or both. With every dot an underscore all of them are one
// spelling, and module names stay apart.
std::string flatten(std::string module) {
    for (char& c : module) {
        if (c == '.') c = '_';
    }
    return module;
}

// What a key of the file is for; false when it is none of a LoRA's.
bool parse_key(std::string name, Key& key) {
    const std::string adapter = "default.";  // PEFT's name for the only one
    for (size_t at = name.find(adapter); at != std::string::npos; at = name.find(adapter)) name.erase(at, adapter.size());
    for (const std::string prefix :
         {"base_model.model.", "transformer.", "model.diffusion_model.", "diffusion_model.", "lora_unet_", "lycoris_", "unet."}) {
        if (name.rfind(prefix, 0) == 0) name.erase(0, prefix.size());
    }
    static const std::pair<const char*, Role> suffixes[] = {
        {".lora_A.weight", Role::down}, {".lora_B.weight", Role::up},      {".lora_down.weight", Role::down},
        {".lora_up.weight", Role::up},  {".lora.down.weight", Role::down}, {".lora.up.weight", Role::up},
        {".alpha", Role::alpha},
    };
    for (const auto& [suffix, role] : suffixes) {
        if (!name.ends_with(suffix)) continue;
        name.resize(name.size() - std::string(suffix).size());
        key = {name, flatten(name), role};
        return true;
    }
    return false;
}

}  // namespace

LoraAdapter::LoraAdapter(const std::filesystem::path& path, const Transformer& transformer, const Placement& placement)
    : path_(path) {
    const auto file = std::make_shared<const Checkpoint>(Checkpoint::from_file(path, "", DIFFUSIONZ_E_LORA));
    written_ = std::filesystem::last_write_time(path);
    std::map<std::string, Transformer::Target> targets;
    for (const auto& [name, target] : transformer.lora_targets()) targets[flatten(name)] = target;

    struct Parts {
        std::string name;
        const TensorView *down = nullptr, *up = nullptr, *alpha = nullptr;
    };
    std::map<std::string, Parts> modules;
    std::vector<std::string> unmatched;
    for (const auto& [name, view] : file->tensors()) {
        Key key;
        if (!parse_key(name, key) || !targets.count(key.module)) {
            unmatched.push_back(name);
            continue;
        }
        Parts& parts = modules[key.module];
        parts.name = key.name;
        (key.role == Role::down ? parts.down : key.role == Role::up ? parts.up : parts.alpha) = &view;
    }
    const size_t total = file->tensors().size(), matched = total - unmatched.size();
    if (total == 0 || static_cast<double>(matched) < kMatchShareMin * static_cast<double>(total)) {
        std::string names;
        for (size_t i = 0; i < unmatched.size() && i < 5; ++i) names += (i ? ", " : "") + unmatched[i];
        fail(DIFFUSIONZ_E_LORA, path.string(), ": ", matched, " of ", total,
             " keys match this model, 95 % must; among the others: ", names.empty() ? "(no keys)" : names);
    }

    const PeftScale peft_scale(path, file->metadata());
    // Some trainers write a product twice, whole and in parts, or under both its names: each row is corrected once, parts first.
    std::map<const Linear*, std::set<int64_t>> corrected;
    std::vector<std::pair<std::string, Parts>> ordered(modules.begin(), modules.end());
    std::stable_partition(ordered.begin(), ordered.end(),
                          [](const auto& module) { return !module.first.ends_with("_attention_qkv"); });
    for (const auto& [module, parts] : ordered) {
        const Transformer::Target& target = targets.at(module);
        if (!parts.down || !parts.up)
            fail(DIFFUSIONZ_E_LORA, path.string(), ": module ", module, " has no ", parts.down ? "up (lora_B)" : "down (lora_A)",
                 " matrix");
        const auto &down = parts.down->shape, &up = parts.up->shape;
        if (down.size() != 2 || up.size() != 2 || down[0] < 1 || down[0] != up[1] || down[1] != target.linear->in_features() ||
            up[0] != target.rows) {
            fail(DIFFUSIONZ_E_LORA, path.string(), ": module ", module, " has matrices ", shape_text(down), " and ",
                 shape_text(up), "; this model needs [rank, ", target.linear->in_features(), "] and [", target.rows, ", rank]");
        }
        auto& rows = corrected[target.linear];
        const bool whole = module.ends_with("_attention_qkv");
        if (whole ? !rows.empty() : rows.count(target.row_begin) != 0) continue;
        rows.insert(target.row_begin);

        // A copy, whose alignment is not the file's: a product of the same numbers at another alignment may round differently.
        const auto load = [&](const TensorView& view) {
            return as_tensor(view, file, path.string() + ": module " + module, DIFFUSIONZ_E_LORA)
                .to(at::TensorOptions().device(placement.device).dtype(placement.dtype), /*non_blocking=*/false, /*copy=*/true);
        };
        LoraPair pair{load(*parts.down), load(*parts.up), target.row_begin, peft_scale(parts.name, down[0])};
        if (parts.alpha) {
            const at::Tensor alpha = as_tensor(*parts.alpha, file, path.string() + ": module " + module, DIFFUSIONZ_E_LORA);
            if (alpha.numel() != 1)
                fail(DIFFUSIONZ_E_LORA, path.string(), ": module ", module, " has an alpha of ", alpha.numel(),
                     " values; it must be one");
            pair.scale = alpha.to(at::kDouble).item<double>() / static_cast<double>(down[0]);
        }
        nbytes_ += pair.down.nbytes() + pair.up.nbytes();
        pairs_.emplace_back(target.linear, std::move(pair));
    }
}

bool LoraAdapter::is_current() const {
    std::error_code error;
    return std::filesystem::last_write_time(path_, error) == written_ && !error;
}

void LoraAdapter::add_to(LoraPairs& pairs, double weight) const {
    for (const auto& [linear, pair] : pairs_) {
        LoraPair weighted = pair;
        weighted.scale *= weight;
        pairs[linear].push_back(std::move(weighted));
    }
}

namespace {

constexpr int64_t kSmallestBucket = 16;

int64_t bucket_of(int64_t rank) {
    int64_t bucket = kSmallestBucket;
    while (bucket < rank) bucket *= 2;
    return bucket;
}

// The pairs of one layer that share a buffer. One product in place of several, unless `up` would then be larger than the layer's
// own weight: the blocks of a product of many layers (adaLN) stay apart.
std::vector<std::vector<const LoraPair*>> shared_buffers(const Linear& linear, const std::vector<LoraPair>& pairs) {
    int64_t rank = 0;
    for (const LoraPair& pair : pairs) rank += pair.down.size(0);
    const bool together = bucket_of(rank) <= linear.in_features();
    std::vector<std::vector<const LoraPair*>> buffers;
    for (const LoraPair& pair : pairs) {
        if (buffers.empty() || !together) buffers.emplace_back();
        buffers.back().push_back(&pair);
    }
    return buffers;
}

// The buffers of one layer, empty.
std::vector<LoraPair> make_buffers(const Linear& linear, const std::vector<LoraPair>& pairs) {
    std::vector<LoraPair> buffers;
    for (const auto& members : shared_buffers(linear, pairs)) {
        int64_t rank = 0, begin = members[0]->row_begin, end = begin;
        for (const LoraPair* pair : members) {
            rank += pair->down.size(0);
            begin = std::min(begin, pair->row_begin);
            end = std::max(end, pair->row_begin + pair->up.size(0));
        }
        const auto options = pairs[0].down.options();
        buffers.push_back({at::zeros({bucket_of(rank), linear.in_features()}, options),
                           at::zeros({end - begin, bucket_of(rank)}, options), begin, 1.0});
    }
    return buffers;
}

}  // namespace

LoraBank::LoraBank(const LoraPairs& pairs) {
    for (const auto& [linear, own] : pairs) buffers_[linear] = make_buffers(*linear, own);
    load(pairs);
}

bool LoraBank::fits(const LoraPairs& pairs) const {
    if (pairs.size() != buffers_.size()) return false;
    for (const auto& [linear, own] : pairs) {
        const auto found = buffers_.find(linear);
        if (found == buffers_.end()) return false;
        const auto shared = shared_buffers(*linear, own);
        if (shared.size() != found->second.size()) return false;
        for (size_t i = 0; i < shared.size(); ++i) {
            const LoraPair& buffer = found->second[i];
            int64_t rank = 0;
            bool inside = true;
            for (const LoraPair* pair : shared[i]) {
                rank += pair->down.size(0);
                inside = inside && pair->row_begin >= buffer.row_begin &&
                         pair->row_begin + pair->up.size(0) <= buffer.row_begin + buffer.up.size(0);
            }
            if (!inside || bucket_of(rank) != buffer.down.size(0)) return false;
        }
    }
    return true;
}

void LoraBank::load(const LoraPairs& pairs) {
    for (const auto& [linear, own] : pairs) {
        const auto shared = shared_buffers(*linear, own);
        for (size_t i = 0; i < shared.size(); ++i) {
            LoraPair& buffer = buffers_.at(linear)[i];
            buffer.down.zero_();
            buffer.up.zero_();
            int64_t rank = 0;
            for (const LoraPair* pair : shared[i]) {
                const int64_t own_rank = pair->down.size(0);
                buffer.down.narrow(0, rank, own_rank).copy_(pair->down);
                buffer.up.narrow(0, pair->row_begin - buffer.row_begin, pair->up.size(0))
                    .narrow(1, rank, own_rank)
                    .copy_(pair->up * pair->scale);
                rank += own_rank;
            }
        }
    }
}

}  // namespace diffusionz
