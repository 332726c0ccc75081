#include "ops/residual_norm.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include "ops/disabled.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/residual_norm.h"
#include "ops/cuda.h"
#endif

namespace diffusionz {

at::Tensor residual_norm(at::Tensor x, const at::Tensor& a, const at::Tensor& b, bool keep, double eps, at::ScalarType dtype) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (x.is_cuda() && x.size(1) % 4 == 0 && x.stride(0) % 4 == 0 && !kernel_disabled("residual_norm")) {
        at::Tensor y = at::empty(x.sizes(), x.options().dtype(dtype));
        kernels::ResidualNormArguments p{};
        p.type = kernel_type(dtype);
        p.x = x.mutable_data_ptr<float>();
        p.a = data_of(a), p.b = data_of(b);
        p.keep = keep;
        p.y = y.mutable_data_ptr();
        p.rows = x.size(0), p.x_stride = x.stride(0);
        p.width = static_cast<int32_t>(x.size(1));
        p.epsilon = static_cast<float>(eps);
        check_launch("residual_norm", kernels::residual_norm(p, current_stream(x)));
        return y;
    }
#endif
    at::Tensor sum = keep ? x : x.clone();
    if (a.defined()) sum.add_(a);
    if (b.defined()) sum.add_(b);
    return (sum * at::rsqrt(sum.square().mean(-1, /*keepdim=*/true).add_(eps))).to(dtype);
}

}  // namespace diffusionz
