// y = x W^T on Hopper's tensor cores: see gemm_sm90.cu.
#pragma once

#include "kernels/types.h"

namespace diffusionz::kernels {

// Contiguous, addresses multiples of 16.
struct Gemm {
    const void* x = nullptr;       // [rows, depth]
    const void* weight = nullptr;  // [columns, depth]
    // Both null for bfloat16 factors; else the factors are float8_e4m3fn and these multiply y's rows and columns.
    const float* x_scales = nullptr;
    const float* weight_scales = nullptr;
    void* y = nullptr;  // bfloat16 [rows, columns]
    int64_t rows = 0, columns = 0, depth = 0;
    // y [rows, columns / 2] = silu(x W1^T) * (x W3^T), with W1 and W3 the weight's halves.
    bool gated = false;
};

constexpr int kGemmTiles = 4;  // ways to cut y into tiles

// The tile that is fastest for these sizes, or -1 where the library's product is.
int gemm_sm90_tile(const Gemm& gemm, int multiprocessors);
// Compute capability 9.0 only. rows, columns < 2^31; depth a multiple of 16 bytes, y's columns a multiple of 8.
cudaError_t gemm_sm90(const Gemm& gemm, int tile, int multiprocessors, cudaStream_t stream);

}  // namespace diffusionz::kernels
