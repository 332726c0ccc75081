#include "ops/rms_norm.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace diffusionz {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
    const at::Tensor wide = x.to(at::kFloat);
    const at::Tensor scale = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true).add_(eps));
    return (wide * scale).to(x.scalar_type()).mul_(weight);
}

}  // namespace diffusionz
