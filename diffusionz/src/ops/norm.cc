#include "ops/norm.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace diffusionz {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor scale = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true).add_(eps));
    at::Tensor y = (wide * scale).to(x.scalar_type());
    return weight.defined() ? y.mul_(weight) : y;
}

at::Tensor group_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, int64_t groups, double eps, bool silu) {
    at::Tensor y = at::group_norm(x, groups, weight, bias, eps);
    return silu ? at::silu_(y) : y;
}

}  // namespace diffusionz
