// torch.ops.diffusionz: matrix products.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "kernels/gemm_sm90.h"
#include "ops/cuda.h"
#include "ops/gated_linear.h"
#include "ops/linear.h"

namespace diffusionz {
namespace {

using Optional = std::optional<at::Tensor>;

Activation activation_of(const Optional& plain, const Optional& fp8, const Optional& row_scales) {
    Activation x;
    x.plain = plain.value_or(at::Tensor());
    x.fp8 = fp8.value_or(at::Tensor());
    x.row_scales = row_scales.value_or(at::Tensor());
    return x;
}

TORCH_LIBRARY_FRAGMENT(diffusionz, m) {
    m.def("gemm_tiles", [] { return static_cast<int64_t>(kernels::kGemmTiles); });
    // The kernel with a tile of the caller's choice; x [rows, depth].
    m.def("gemm", [](const at::Tensor& x, const at::Tensor& weight, const Optional& x_scales, const Optional& weight_scales,
                     bool gated, int64_t tile) {
        kernels::Gemm gemm;
        gemm.x = x.const_data_ptr();
        gemm.weight = weight.const_data_ptr();
        gemm.rows = x.size(0);
        gemm.depth = x.size(1);
        gemm.columns = weight.size(0);
        gemm.gated = gated;
        if (x_scales) {
            gemm.x_scales = x_scales->const_data_ptr<float>();
            gemm.weight_scales = weight_scales->const_data_ptr<float>();
        }
        at::Tensor y = at::empty({x.size(0), gated ? weight.size(0) / 2 : weight.size(0)}, x.options().dtype(at::kBFloat16));
        gemm.y = y.mutable_data_ptr();
        int multiprocessors = 0;
        check_launch("gemm", cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.device().index()));
        check_launch("gemm", kernels::gemm_sm90(gemm, static_cast<int>(tile), multiprocessors, current_stream(x)));
        return y;
    });
    // The tile that is chosen on 132 multiprocessors, -1 for the library's product.
    m.def("gemm_tile", [](int64_t rows, int64_t columns, int64_t depth, bool fp8, bool gated) {
        static const float scales = 1;
        kernels::Gemm gemm;
        gemm.rows = rows;
        gemm.columns = columns;
        gemm.depth = depth;
        gemm.gated = gated;
        if (fp8) gemm.x_scales = gemm.weight_scales = &scales;
        return static_cast<int64_t>(kernels::gemm_sm90_tile(gemm, 132));
    });
    m.def("linear", [](const Optional& plain, const Optional& fp8, const Optional& row_scales, const at::Tensor& weight,
                       const Optional& bias, bool fp8_products, const Optional& down, const Optional& up) {
        const Linear linear(weight, bias.value_or(at::Tensor()), fp8_products ? Products::fp8 : Products::plain);
        LoraPairs pairs;
        if (down) pairs[&linear].push_back({*down, *up, 8, 0.5});
        return linear(activation_of(plain, fp8, row_scales), down ? &pairs : nullptr);
    });
    m.def("gated_linear", [](const at::Tensor& x, const at::Tensor& weight, bool fp8_products, bool fp8_form, const Optional& down,
                             const Optional& up) {
        const Linear linear(weight, {}, fp8_products ? Products::fp8 : Products::plain);
        LoraPairs pairs;
        if (down) pairs[&linear].push_back({*down, *up, 8, 0.5});
        const Activation y = gated_linear(linear, x, down ? &pairs : nullptr, fp8_form ? Form::both : Form::plain);
        std::vector<at::Tensor> forms{y.plain};
        if (fp8_form) forms.insert(forms.end(), {y.fp8, y.row_scales});
        return forms;
    });
}

}  // namespace
}  // namespace diffusionz
