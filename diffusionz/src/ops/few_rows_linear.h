// Products of so few rows that the weights' way from memory is what takes time, each with what stands around it in a layer: one
// launch instead of three, and bit for bit the same for a row whatever rows stand beside it. CUDA alone, from compute capability
// 9.0 on; the layer written with at::linear and residual_norm is the reference (DIFFUSIONZ_DISABLE_KERNELS=few_rows_linear).
// Each kernel starts while the one before it ends, and waits for its results.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// A residual stream, as few_rows_add leaves it.
struct Stream {
    at::Tensor values;       // float32 [rows, width]
    at::Tensor squares;      // float32 [rows, width / 16], each the squares of 16 numbers
    at::Tensor rows;         // in 16 bits: the stream, normalised by what follows, or not at all where that is undefined
    at::Tensor row_squares;  // of the stream before the last sum
};

// Whether the device of `weight` [out, in], its dtype and its size have a kernel.
bool few_rows_linear_fits(const at::Tensor& weight);

// x W^T, x in the weight's dtype, without what is below 0 where `relu`.
at::Tensor few_rows_linear(const at::Tensor& x, const at::Tensor& weight, bool relu);
// The same of x / sqrt(mean(x^2) + eps); the norm's weight is part of `weight`.
at::Tensor few_rows_linear(const Stream& x, double eps, const at::Tensor& weight, bool relu);

// sum + x W^T; sum.values may be undefined for 0.
Stream few_rows_add(const Stream& sum, double eps, const at::Tensor& x, const at::Tensor& weight);
// sum + (sum / sqrt(mean(sum^2) + eps)) W^T.
Stream few_rows_add_own(const Stream& sum, double eps, const at::Tensor& weight);

}  // namespace diffusionz
