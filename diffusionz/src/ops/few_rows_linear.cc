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

const float* floats_of(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }

kernels::FewRowsLinearArguments arguments_of(const at::Tensor& x, const at::Tensor& weight, double eps) {
    kernels::FewRowsLinearArguments p{};
    p.type = kernel_type(weight.scalar_type());
    p.rows = static_cast<int32_t>(x.size(0));
    p.in = static_cast<int32_t>(weight.size(1)), p.out = static_cast<int32_t>(weight.size(0));
    p.x = x.const_data_ptr();
    p.weight = weight.const_data_ptr();
    p.epsilon = static_cast<float>(eps);
    p.overlapped = true;
    return p;
}

// The factors that make the product that of the normalised stream.
void normalise(kernels::FewRowsLinearArguments& p, const Stream& stream) {
    p.squares = stream.squares.const_data_ptr<float>();
    p.x_squares = floats_of(stream.row_squares);
}

at::Tensor run(kernels::FewRowsLinearArguments& p, const at::Tensor& weight, bool relu) {
    p.finish = relu ? kernels::FewRowsFinish::relu : kernels::FewRowsFinish::store;
    at::Tensor y = at::empty({p.rows, p.out}, weight.options());
    p.y = y.mutable_data_ptr();
    check_launch("few_rows_linear", kernels::few_rows_linear(p, current_stream(weight)));
    return y;
}

Stream run_add(kernels::FewRowsLinearArguments& p, const Stream& sum, const at::Tensor& weight) {
    p.finish = kernels::FewRowsFinish::add;
    const auto f32 = weight.options().dtype(at::kFloat);
    const Stream result{at::empty({p.rows, p.out}, f32), at::empty({p.rows, p.out / kernels::kSquaresOf}, f32),
                        at::empty({p.rows, p.out}, weight.options()), sum.squares};
    p.residual = floats_of(sum.values), p.residual_squares = floats_of(sum.squares);
    p.sum = result.values.mutable_data_ptr<float>(), p.sum_squares = result.squares.mutable_data_ptr<float>();
    p.y = result.rows.mutable_data_ptr();
    check_launch("few_rows_linear", kernels::few_rows_linear(p, current_stream(weight)));
    return result;
}

}  // namespace

bool few_rows_linear_fits(const at::Tensor& weight) {
    if (!weight.is_cuda() || (weight.scalar_type() != at::kHalf && weight.scalar_type() != at::kBFloat16)) return false;
    return kernels::few_rows_linear_fits(weight.device().index(), weight.size(1), weight.size(0)) &&
           !kernel_disabled("few_rows_linear");
}

at::Tensor few_rows_linear(const at::Tensor& x, const at::Tensor& weight, bool relu) {
    kernels::FewRowsLinearArguments p = arguments_of(x, weight, 0.0);
    return run(p, weight, relu);
}

at::Tensor few_rows_linear(const Stream& x, double eps, const at::Tensor& weight, bool relu) {
    kernels::FewRowsLinearArguments p = arguments_of(x.rows, weight, eps);
    normalise(p, x);
    return run(p, weight, relu);
}

Stream few_rows_add(const Stream& sum, double eps, const at::Tensor& x, const at::Tensor& weight) {
    kernels::FewRowsLinearArguments p = arguments_of(x, weight, eps);
    return run_add(p, sum, weight);
}

Stream few_rows_add_own(const Stream& sum, double eps, const at::Tensor& weight) {
    kernels::FewRowsLinearArguments p = arguments_of(sum.rows, weight, eps);
    normalise(p, sum);
    return run_add(p, sum, weight);
}

#else

bool few_rows_linear_fits(const at::Tensor&) { return false; }
at::Tensor few_rows_linear(const at::Tensor& x, const at::Tensor&, bool) { return x; }
at::Tensor few_rows_linear(const Stream& x, double, const at::Tensor&, bool) { return x.rows; }
Stream few_rows_add(const Stream& sum, double, const at::Tensor&, const at::Tensor&) { return sum; }
Stream few_rows_add_own(const Stream& sum, double, const at::Tensor&) { return sum; }

#endif

}  // namespace diffusionz
