#include "ops/few_rows_linear.h"

#include <ATen/Functions.h>

#include "ops/disabled.h"
#include "ops/residual_norm.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include "kernels/few_rows_linear.h"
#include "ops/cuda.h"
#endif

namespace diffusionz {
namespace {

#ifdef DIFFUSIONZ_WITH_CUDA

static_assert(FewRows::kWidthMax == kernels::kRowSquaresPitch * kernels::kFewRowsColumns);

// In how many parts the depth of such a product is shared; 0 where no kernel takes it.
int parts_of(const at::Tensor& weight) {
    if (!weight.is_cuda() || (weight.scalar_type() != at::kHalf && weight.scalar_type() != at::kBFloat16)) return 0;
    return kernels::few_rows_linear_parts(weight.size(0), weight.size(1), compute_capability(weight));
}

at::Tensor empty_squares(const at::Tensor& stream) {
    return at::empty({stream.size(0), kernels::kRowSquaresPitch}, stream.options());
}

#endif

}  // namespace

bool FewRows::takes([[maybe_unused]] const at::Tensor& weight) {
#ifdef DIFFUSIONZ_WITH_CUDA
    return !kernel_disabled("few_rows_linear") && weight.is_contiguous() && parts_of(weight) > 0;
#else
    return false;
#endif
}

FewRows::FewRows(at::Tensor x, double eps, at::ScalarType dtype)
    : numbers_(std::move(x)), eps_(eps), dtype_(dtype), kernel_(numbers_.is_cuda() && !kernel_disabled("few_rows_linear")) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (!kernel_) return;
    scaled_ = at::empty(numbers_.sizes(), numbers_.options().dtype(dtype));
    squares_ = scale_squares_ = {empty_squares(numbers_), 1};
    kernels::ScaledRows p{};
    p.type = kernel_type(dtype);
    p.x = numbers_.const_data_ptr<float>();
    p.rows = numbers_.size(0), p.width = numbers_.size(1);
    p.epsilon = static_cast<float>(eps);
    p.squares = squares_.numbers.mutable_data_ptr<float>();
    p.y = scaled_.mutable_data_ptr();
    check_launch("few_rows_linear", kernels::scale_rows(p, current_stream(numbers_)));
#endif
}

void FewRows::run([[maybe_unused]] const at::Tensor& x, [[maybe_unused]] const at::Tensor& weight, [[maybe_unused]] bool normed,
                  [[maybe_unused]] bool relu, [[maybe_unused]] Squares* sum_squares, [[maybe_unused]] at::Tensor& y) const {
#ifdef DIFFUSIONZ_WITH_CUDA
    kernels::FewRowsLinear p{};
    p.type = kernel_type(dtype_);
    p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr();
    p.rows = x.size(0), p.columns = weight.size(0), p.depth = weight.size(1);
    const auto row_squares = [](const Squares& squares) {
        return kernels::RowSquares{squares.numbers.const_data_ptr<float>(), squares.parts};
    };
    p.squares = row_squares(squares_);
    if (normed) p.scale_squares = row_squares(scale_squares_);
    p.inverse_width = 1.0f / static_cast<float>(numbers_.size(1));
    p.epsilon = static_cast<float>(eps_);
    p.relu = relu;
    if (sum_squares) {
        p.sum = numbers_.mutable_data_ptr<float>();
        *sum_squares = {empty_squares(numbers_), static_cast<int32_t>(p.columns / kernels::kFewRowsColumns)};
        p.sum_squares = sum_squares->numbers.mutable_data_ptr<float>();
    }
    p.y = y.mutable_data_ptr();
    check_launch("few_rows_linear", kernels::few_rows_linear(p, parts_of(weight), current_stream(x)));
#endif
}

at::Tensor FewRows::product(const at::Tensor& weight, bool relu) const {
    if (!kernel_) {
        const at::Tensor y = at::mm(residual_norm(numbers_, {}, {}, /*keep=*/false, eps_, dtype_), weight.t());
        return relu ? y.relu() : y;
    }
    at::Tensor y = at::empty({numbers_.size(0), weight.size(0)}, scaled_.options());
    run(scaled_, weight, /*normed=*/true, relu, nullptr, y);
    return y;
}

void FewRows::add_own(const at::Tensor& weight) {
    if (!kernel_) return add(residual_norm(numbers_, {}, {}, /*keep=*/false, eps_, dtype_), weight);
    Squares squares;
    at::Tensor scaled = at::empty_like(scaled_);  // others still read the stream that it was
    run(scaled_, weight, /*normed=*/true, /*relu=*/false, &squares, scaled);
    scaled_ = scaled;
    scale_squares_ = squares_, squares_ = squares;
}

void FewRows::add(const at::Tensor& x, const at::Tensor& weight) {
    if (!kernel_) {
        numbers_.add_(at::mm(x.to(at::kFloat), weight.to(at::kFloat).t()));
        return;
    }
    Squares squares;
    run(x, weight, /*normed=*/false, /*relu=*/false, &squares, scaled_);
    scale_squares_ = squares_, squares_ = squares;
}

}  // namespace diffusionz
