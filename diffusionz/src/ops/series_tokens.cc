#include "ops/series_tokens.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <limits>

#include "ops/disabled.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/series_tokens.h"
#include "ops/cuda.h"
#endif

namespace diffusionz {
namespace {

constexpr int64_t kWidthUnit = 32;  // of the products that read features

bool has_16_bits(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }

int64_t feature_width(int64_t values, at::ScalarType dtype) {
    const int64_t needed = has_16_bits(dtype) ? 3 * values + 4 : values + 2;
    return (needed + kWidthUnit - 1) / kWidthUnit * kWidthUnit;
}

at::Tensor rounding_error(const at::Tensor& x, at::ScalarType dtype) { return x - x.to(dtype).to(at::kFloat); }

SeriesTokens series_tokens_reference(const SeriesPatches& patches, const at::Tensor& context, const at::Tensor& future,
                                     at::ScalarType dtype) {
    const int64_t rows = context.size(0), patch = patches.patch, steps = context.size(1), horizon = future.size(1);
    const at::Tensor known = context.isnan().logical_not();
    const at::Tensor count = known.sum(1, /*keepdim=*/true).to(at::kDouble), wide = context.to(at::kDouble);
    const at::Tensor loc = at::where(count > 0, at::nansum(wide, {1}, /*keepdim=*/true) / count, 0.0).to(at::kFloat);
    const at::Tensor variance = at::nansum((wide - loc).square(), {1}, /*keepdim=*/true) / count;
    const at::Tensor deviation = at::where(count > 0, variance.sqrt(), 1.0).to(at::kFloat);
    const at::Tensor scale = at::where(deviation == 0, 1e-5, deviation).to(at::kFloat);

    const auto patches_of = [&](const at::Tensor& values, double first) {
        const at::Tensor observed = values.isnan().logical_not();
        at::Tensor scaled = at::where(observed, (values.to(at::kDouble) - loc) / scale, 0.0).to(at::kFloat);
        if (patches.arcsinh) scaled = scaled.asinh();
        const at::Tensor time = at::arange(values.size(1), scaled.options()).add_(first).div_(patches.time_encoding_scale);
        const auto cut = [&](const at::Tensor& x) { return x.to(at::kFloat).expand(values.sizes()).reshape({rows, -1, patch}); };
        return at::cat({cut(time), cut(scaled), cut(observed)}, -1);
    };
    std::vector<at::Tensor> parts = {patches_of(context, static_cast<double>(-steps)), patches_of(future, 0.0)};
    const int64_t tokens = (steps + horizon) / patch + patches.register_token;
    at::Tensor ones = at::zeros({rows, tokens, 2}, context.options());  // of the bias, of the register
    ones.select(2, 0).fill_(1.0);
    if (patches.register_token) {
        parts.insert(parts.begin() + 1, at::zeros({rows, 1, 3 * patch}, context.options()));
        ones.select(1, steps / patch).select(1, 0).fill_(0.0);
        ones.select(1, steps / patch).select(1, 1).fill_(1.0);
    }
    const at::Tensor values = at::cat(parts, 1);
    SeriesTokens result;
    at::Tensor features = has_16_bits(dtype)
                              ? at::cat({values, rounding_error(values, dtype), values, ones.repeat_interleave(2, 2)}, 2)
                              : at::cat({values, ones}, 2);
    const int64_t width = feature_width(3 * patch, dtype);
    result.features = at::constant_pad_nd(features, {0, width - features.size(2)}).to(dtype).reshape({rows * tokens, width});
    result.valid = at::ones({rows, tokens}, context.options().dtype(at::kByte));
    result.valid.narrow(1, 0, steps / patch).copy_(known.reshape({rows, -1, patch}).any(2));
    result.loc = loc.squeeze(1), result.scale = scale.squeeze(1);
    return result;
}

}  // namespace

SeriesTokens series_tokens(const SeriesPatches& patches, const at::Tensor& context, const at::Tensor& future,
                           at::ScalarType dtype) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (context.is_cuda() && !kernel_disabled("series_tokens")) {
        const int64_t rows = context.size(0),
                      tokens = (context.size(1) + future.size(1)) / patches.patch + patches.register_token;
        SeriesTokens result;
        kernels::SeriesTokensArguments p{};
        p.type = kernel_type(dtype);
        p.context = context.const_data_ptr<float>(), p.future = future.const_data_ptr<float>();
        p.rows = static_cast<int32_t>(rows), p.patch = static_cast<int32_t>(patches.patch);
        p.context_patches = static_cast<int32_t>(context.size(1) / patches.patch);
        p.future_patches = static_cast<int32_t>(future.size(1) / patches.patch);
        p.register_token = patches.register_token, p.arcsinh = patches.arcsinh;
        p.time_encoding_scale = static_cast<float>(patches.time_encoding_scale);
        p.width = static_cast<int32_t>(feature_width(3 * patches.patch, dtype));
        result.features = at::empty({rows * tokens, p.width}, context.options().dtype(dtype));
        result.valid = at::empty({rows, tokens}, context.options().dtype(at::kByte));
        result.loc = at::empty({rows}, context.options()), result.scale = at::empty({rows}, context.options());
        p.features = result.features.mutable_data_ptr(), p.valid = result.valid.mutable_data_ptr<uint8_t>();
        p.loc = result.loc.mutable_data_ptr<float>(), p.scale = result.scale.mutable_data_ptr<float>();
        check_launch("series_tokens", kernels::series_tokens(p, current_stream(context)));
        return result;
    }
#endif
    return series_tokens_reference(patches, context, future, dtype);
}

at::Tensor series_weight(const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& register_embedding,
                         at::ScalarType dtype) {
    const at::Tensor b = bias.unsqueeze(1),
                     r = register_embedding.defined() ? register_embedding.unsqueeze(1) : at::zeros_like(b);
    const at::Tensor parts =
        has_16_bits(dtype)
            ? at::cat({weight, weight, rounding_error(weight, dtype), b, rounding_error(b, dtype), r, rounding_error(r, dtype)},
                      1)
            : at::cat({weight, b, r}, 1);
    return at::constant_pad_nd(parts, {0, feature_width(weight.size(1), dtype) - parts.size(1)}).to(dtype).contiguous();
}

}  // namespace diffusionz
