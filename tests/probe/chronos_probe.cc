// Runs single passes of the Chronos-2 engine for the parity tests, which compare every stage with upstream.
//
//   chronos_probe PLAN.json
//
// The plan: {"model": FOLDER, "precision": "float32" | "bfloat16", "inputs": FILE.safetensors, "outputs": FILE.safetensors,
// "passes": [{"rows": [NAME, ...] each [steps], "futures": [NAME or "", ...] each [known steps], "groups": [[first row, rows],
// ...] with those of several rows first, "output_patches": N, "out"}]}. A pass writes, float32, under "out" and a dot:
//   features [tokens, 3 patch], embedding, block 0.., norm [tokens, width]    rows one after the other, missing patches left out
//   outputs [rows * N, width], head [rows * N, levels * patch]                of the pass that computes the last layer for
//   outputs only loc, scale, patches [rows]    a row's context patches, missing ones included row_begin [rows + 1], positions
//   [tokens]    of each row's tokens
#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>


#include "chronos/model.h"
#include "core/json_file.h"
#include "plan_main.h"
#include "write_safetensors.h"

using namespace diffusionz;

namespace {

void run(const char* plan_path) {
    const nlohmann::json plan = JsonFile::load(plan_path).object();
    const c10::InferenceMode inference;
    const auto dtype = plan.value("precision", "float32") == "bfloat16" ? at::kBFloat16 : at::kFloat;
    const auto model = chronos::Model::load(plan.at("model").get<std::string>(), "", {at::kCPU, dtype});
    const auto inputs = std::make_shared<const Checkpoint>(Checkpoint::from_file(plan.at("inputs").get<std::string>()));

    std::vector<std::pair<std::string, at::Tensor>> outputs;
    for (const auto& pass : plan.at("passes")) {
        std::vector<at::Tensor> kept;
        const auto values = [&](const std::string& name) {
            kept.push_back(as_tensor(inputs->at(name), inputs, name, DIFFUSIONZ_E_ARGUMENT).contiguous());
            return std::pair(kept.back().const_data_ptr<float>(), kept.back().numel());
        };
        std::vector<chronos::Row> rows;
        for (size_t i = 0; i < pass.at("rows").size(); ++i) {
            const auto [context, length] = values(pass["rows"][i]);
            const std::string future = pass.at("futures").at(i);
            const auto [known, known_length] = future.empty() ? std::pair<const float*, int64_t>(nullptr, 0) : values(future);
            rows.push_back({context, length, known, known_length});
        }
        std::vector<chronos::Group> groups;
        for (const auto& group : pass.at("groups")) groups.push_back({group.at(0), group.at(1)});
        const chronos::Tokens tokens =
            chronos::make_tokens(model->config(), rows, groups, pass.at("output_patches"), model->folds_single_groups());

        const auto keep = [&](const std::string& name, const at::Tensor& tensor) {
            // A copy: the hidden states go on changing in place.
            outputs.emplace_back(pass.at("out").get<std::string>() + "." + name,
                                 tensor.to(at::kFloat, false, /*copy=*/true).contiguous());
        };
        keep("features", tokens.features);
        int64_t seen = -1;
        const auto watch = [&](const at::Tensor& x) {
            keep(seen < 0 ? "embedding" : "block " + std::to_string(seen), x);
            ++seen;
        };
        keep("norm", model->encode(tokens, /*all=*/true, watch));
        const at::Tensor last = model->encode(tokens, /*all=*/false);
        keep("outputs", last);
        keep("head", model->head(last));
        std::vector<float> loc, scale;
        for (const chronos::Scale& row : tokens.scales) {
            loc.push_back(row.loc);
            scale.push_back(row.scale);
        }
        keep("loc", at::tensor(loc));
        keep("scale", at::tensor(scale));
        keep("patches", at::tensor(tokens.context_patches));
        keep("row_begin", at::tensor(tokens.row_begin));
        keep("positions", tokens.positions);
    }
    write_safetensors(plan.at("outputs").get<std::string>(), outputs);
}

}  // namespace

int main(int argc, char** argv) { return plan_main("chronos_probe", argc, argv, run); }
