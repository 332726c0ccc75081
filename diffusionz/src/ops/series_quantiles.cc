#include "ops/series_quantiles.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "ops/disabled.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/series_quantiles.h"
#include "ops/cuda.h"
#endif

namespace diffusionz {

at::Tensor series_quantiles(const at::Tensor& z, const at::Tensor& loc, const at::Tensor& scale, bool arcsinh) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (z.is_cuda() && !kernel_disabled("series_quantiles")) {
        at::Tensor y = at::empty({z.size(0), z.size(2), z.size(1) * z.size(3)}, z.options());
        kernels::SeriesQuantilesArguments p{};
        p.z = z.const_data_ptr<float>();
        p.loc = loc.const_data_ptr<float>(), p.scale = scale.const_data_ptr<float>();
        p.y = y.mutable_data_ptr<float>();
        p.rows = z.size(0);
        p.patches = static_cast<int32_t>(z.size(1)), p.quantiles = static_cast<int32_t>(z.size(2));
        p.patch = static_cast<int32_t>(z.size(3));
        p.arcsinh = arcsinh;
        check_launch("series_quantiles", kernels::series_quantiles(p, current_stream(z)));
        return y;
    }
#endif
    const auto column = [](const at::Tensor& x) { return x.unsqueeze(1).unsqueeze(1); };
    return (arcsinh ? z.sinh() : z).transpose(1, 2).flatten(2) * column(scale) + column(loc);
}

}  // namespace diffusionz
