#include "ops/rope.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace diffusionz {

at::Tensor rope_interleaved(const at::Tensor& x, const at::Tensor& table) {
    const at::Tensor pairs = at::view_as_complex(x.to(at::kFloat).unflatten(-1, {x.size(-1) / 2, 2}).contiguous());
    return at::view_as_real(pairs * table.unsqueeze(1)).flatten(-2).to(x.scalar_type());
}

at::Tensor rope_halves(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
    const auto halves = x.chunk(2, -1);
    const at::Tensor rotated = at::cat({halves[1].neg(), halves[0]}, -1);
    return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1);
}

}  // namespace diffusionz
