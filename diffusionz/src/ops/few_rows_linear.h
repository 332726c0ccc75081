// Products of so few rows that the weights' way from memory is what takes time, each with what stands around it in a layer: one
// launch instead of three, and bit for bit the same for a row whatever rows stand beside it. CUDA alone, from compute capability
// 9.0 on; the layer written with at::linear and residual_norm is the reference (DIFFUSIONZ_DISABLE_KERNELS=few_rows_linear).
// Each kernel starts while the one before it ends, and waits for its results.
#pragma once

#include <ATen/core/Tensor.h>

namespace diffusionz {

// A residual stream, and the squares that its next norm adds up.
struct Stream {
    at::Tensor values;   // float32 [rows, width]
    at::Tensor squares;  // float32 [rows, width / 64], each of 64 numbers
};

// What a product reads: rows in the weight's dtype, or the normalised stream.
struct FewRows {
    at::Tensor x;  // [rows, in]; or undefined, and:
    Stream stream;
    at::Tensor norm_weight;  // float32 [in]
    double epsilon = 0.0;
};

// Whether the device of `weight` [out, in], its dtype and its size have a kernel.
bool few_rows_linear_fits(const at::Tensor& weight);

// rows W^T in the weight's dtype, without what is below 0 where `relu`.
at::Tensor few_rows_linear(const FewRows& rows, const at::Tensor& weight, bool relu);

// residual + rows W^T; residual.values may be undefined for 0.
Stream few_rows_add(const Stream& residual, const FewRows& rows, const at::Tensor& weight);

}  // namespace diffusionz
