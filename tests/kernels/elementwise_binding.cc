// torch.ops.diffusionz: the operations that are fused around a transformer block's products.
#include <torch/library.h>

#include "core/error.h"
#include "ops/modulated_norm.h"
#include "ops/patchify.h"
#include "ops/qk_norm_rope.h"
#include "ops/quantize_rows.h"
#include "ops/rms_norm.h"
#include "ops/silu_gate.h"

namespace diffusionz {
namespace {

using Optional = std::optional<at::Tensor>;
using Forms = std::tuple<Optional, Optional, Optional>;  // plain, fp8, row_scales

at::Tensor tensor_of(const Optional& x) { return x.value_or(at::Tensor()); }

Optional optional_of(const at::Tensor& x) { return x.defined() ? Optional(x) : std::nullopt; }

Forms forms_of(const Activation& x) { return {optional_of(x.plain), optional_of(x.fp8), optional_of(x.row_scales)}; }

Form form_of(const std::string& name) {
    if (name == "plain") return Form::plain;
    if (name == "fp8") return Form::fp8;
    if (name == "both") return Form::both;
    fail(DIFFUSIONZ_E_ARGUMENT, "form is '", name, "'; it must be plain, fp8 or both");
}

TORCH_LIBRARY_FRAGMENT(diffusionz, m) {
    m.def("rms_norm", [](const at::Tensor& x, const at::Tensor& weight, double eps) { return rms_norm(x, weight, eps); });
    m.def("modulated_norm",
          [](const at::Tensor& x, const at::Tensor& weight, double eps, const Optional& scale, std::string form) {
              return forms_of(modulated_norm(x, weight, eps, tensor_of(scale), form_of(form)));
          });
    m.def("gated_residual", [](const at::Tensor& x, const at::Tensor& y, const Optional& weight, double eps, const Optional& gate,
                               const Optional& next_weight, const Optional& next_scale, std::string form) {
        const Residual result = gated_residual(x, y, tensor_of(weight), eps, tensor_of(gate), tensor_of(next_weight),
                                               tensor_of(next_scale), form_of(form));
        return std::tuple_cat(std::tuple<at::Tensor>(result.sum), forms_of(result.normed));
    });
    m.def("modulated_layer_norm",
          [](const at::Tensor& x, double eps, const at::Tensor& scale) { return modulated_layer_norm(x, eps, scale); });
    // In place.
    m.def("qk_norm_rope", [](const at::Tensor& qkv, const Optional& q_weight, const Optional& k_weight, double eps,
                             const at::Tensor& table, int64_t heads, int64_t kv_heads, bool interleaved) {
        qk_norm_rope(qkv, tensor_of(q_weight), tensor_of(k_weight), eps, table, heads, kv_heads,
                     interleaved ? RopePairs::interleaved : RopePairs::halves);
    });
    m.def("silu_gate", [](const at::Tensor& x, std::string form) { return forms_of(silu_gate(x, form_of(form))); });
    m.def("quantize_rows", [](const at::Tensor& x, std::string form) { return forms_of(quantize_rows(x, form_of(form))); });
    m.def("patchify",
          [](const at::Tensor& latents, int64_t patch, at::ScalarType dtype) { return patchify(latents, patch, dtype); });
    m.def("unpatchify", [](const at::Tensor& tokens, int64_t patch, int64_t rows, int64_t columns) {
        return unpatchify(tokens, patch, rows, columns);
    });
    // In place.
    m.def("euler_step",
          [](const at::Tensor& latents, const at::Tensor& prediction, const Optional& negative, double guidance, int64_t patch,
             const at::Tensor& delta) { euler_step(latents, prediction, tensor_of(negative), guidance, patch, delta); });
}

}  // namespace
}  // namespace diffusionz
