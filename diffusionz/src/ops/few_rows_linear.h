// A float32 residual stream of few rows, and the products that read and write it: what a layer of Chronos-2 does to one series.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

class FewRows {
public:
    static constexpr int64_t kWidthMax = 1024;  // of a stream
    // Whether products with such weights have a kernel: on Hopper, in 16 bits, sizes as in kernels/few_rows_linear.h.
    static bool takes(const at::Tensor& weight);

    // x float32 [rows, width], contiguous, which becomes the stream; products in `dtype`, norms with `eps`.
    FewRows(at::Tensor x, double eps, at::ScalarType dtype);

    // norm(stream) W^T in dtype, of weight [out, width]; with `relu` max(that, 0). The norm's own weight is part of W.
    at::Tensor product(const at::Tensor& weight, bool relu = false) const;
    // stream += norm(stream) W^T, of weight [width, width].
    void add_own(const at::Tensor& weight);
    // stream += x W^T, of x [rows, in] in dtype and weight [width, in].
    void add(const at::Tensor& x, const at::Tensor& weight);

    // float32 [rows, width].
    const at::Tensor& numbers() const { return numbers_; }

private:
    // Sums of squares of rows, as kernels::RowSquares.
    struct Squares {
        at::Tensor numbers;
        int32_t parts = 0;
    };
    // By the kernel; with `sum_squares` into the stream, whose new squares it gives.
    void run(const at::Tensor& x, const at::Tensor& weight, bool normed, bool relu, Squares* sum_squares, at::Tensor& y) const;

    at::Tensor numbers_;
    // The stream times a power of two a row, in dtype, and the squares of the stream, and of the one from which those powers
    // follow. The reference has none.
    at::Tensor scaled_;
    Squares squares_, scale_squares_;
    double eps_;
    at::ScalarType dtype_;
    bool kernel_;
};

}  // namespace diffusionz
