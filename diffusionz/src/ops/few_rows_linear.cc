#include "ops/few_rows_linear.h"

#include <ATen/ops/empty.h>

#include "ops/disabled.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/few_rows_linear.h"
#include "ops/cuda.h"
#endif

namespace diffusionz {

#ifdef DIFFUSIONZ_WITH_CUDA
namespace {

kernels::FewRowsLinearArguments arguments_of(const FewRows& rows, const at::Tensor& weight, kernels::FewRowsFinish finish) {
    kernels::FewRowsLinearArguments p{};
    p.type = kernel_type(weight.scalar_type());
    p.rows = static_cast<int32_t>((rows.x.defined() ? rows.x : rows.stream.values).size(0));
    p.in = static_cast<int32_t>(weight.size(1)), p.out = static_cast<int32_t>(weight.size(0));
    p.weight = weight.const_data_ptr();
    p.finish = finish;
    p.overlapped = true;
    if (rows.x.defined()) {
        p.x = rows.x.const_data_ptr();
    } else {
        p.stream = rows.stream.values.const_data_ptr<float>();
        p.squares = rows.stream.squares.const_data_ptr<float>();
        p.norm_weight = rows.norm_weight.const_data_ptr<float>();
        p.epsilon = static_cast<float>(rows.epsilon);
    }
    return p;
}

}  // namespace

bool few_rows_linear_fits(const at::Tensor& weight) {
    if (!weight.is_cuda() || (weight.scalar_type() != at::kHalf && weight.scalar_type() != at::kBFloat16)) return false;
    return kernels::few_rows_linear_fits(weight.device().index(), weight.size(1), weight.size(0)) &&
           !kernel_disabled("few_rows_linear");
}

at::Tensor few_rows_linear(const FewRows& rows, const at::Tensor& weight, bool relu) {
    kernels::FewRowsLinearArguments p =
        arguments_of(rows, weight, relu ? kernels::FewRowsFinish::relu : kernels::FewRowsFinish::store);
    at::Tensor y = at::empty({p.rows, p.out}, weight.options());
    p.y = y.mutable_data_ptr();
    check_launch("few_rows_linear", kernels::few_rows_linear(p, current_stream(weight)));
    return y;
}

Stream few_rows_add(const Stream& residual, const FewRows& rows, const at::Tensor& weight) {
    kernels::FewRowsLinearArguments p = arguments_of(rows, weight, kernels::FewRowsFinish::add);
    const auto f32 = weight.options().dtype(at::kFloat);
    Stream sum{at::empty({p.rows, p.out}, f32), at::empty({p.rows, p.out / 64}, f32)};
    p.residual = residual.values.defined() ? residual.values.const_data_ptr<float>() : nullptr;
    p.sum = sum.values.mutable_data_ptr<float>();
    p.sum_squares = sum.squares.mutable_data_ptr<float>();
    check_launch("few_rows_linear", kernels::few_rows_linear(p, current_stream(weight)));
    return sum;
}

#else

bool few_rows_linear_fits(const at::Tensor&) { return false; }
at::Tensor few_rows_linear(const FewRows&, const at::Tensor& weight, bool) { return weight; }
Stream few_rows_add(const Stream& residual, const FewRows&, const at::Tensor&) { return residual; }

#endif

}  // namespace diffusionz
