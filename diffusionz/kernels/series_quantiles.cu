// y = sinh(z) * scale + loc: what Chronos-2's head gives, patch by patch, as quantiles of the series, step by step. In float32,
// as upstream does it since a level far above the variation lost its digits in 16 bits. Reference: ops/series_quantiles.cc.

#include <cuda_runtime.h>

#include "kernels/rows.cuh"
#include "kernels/series_quantiles.h"

namespace diffusionz::kernels {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) quantiles_kernel(SeriesQuantilesArguments p) {
    between_kernels();
    const int64_t steps = static_cast<int64_t>(p.patches) * p.patch, of_row = steps * p.quantiles;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= p.rows * of_row) return;
    const int64_t row = at / of_row, quantile = at % of_row / steps, step = at % steps;
    const float z = p.z[((row * p.patches + step / p.patch) * p.quantiles + quantile) * p.patch + step % p.patch];
    p.y[at] = fmaf(p.arcsinh ? sinhf(z) : z, p.scale[row], p.loc[row]);
}

}  // namespace

cudaError_t series_quantiles(const SeriesQuantilesArguments& p, cudaStream_t stream) {
    const int64_t count = p.rows * p.patches * p.patch * p.quantiles;
    if (count == 0) return cudaSuccess;
    return launch(quantiles_kernel, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), kThreads, 0, stream,
                  /*overlapped=*/true, p);
}

}  // namespace diffusionz::kernels
