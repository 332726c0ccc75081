// Between ATen and the kernels: types, the current stream, and faults.
#pragma once

#ifdef DIFFUSIONZ_WITH_CUDA

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>

#include "core/error.h"
#include "kernels/types.h"

namespace diffusionz {

inline kernels::Type kernel_type(at::ScalarType dtype) {
    switch (dtype) {
        case at::kFloat:
            return kernels::Type::float32;
        case at::kHalf:
            return kernels::Type::float16;
        case at::kBFloat16:
            return kernels::Type::bfloat16;
        default:
            fail(DIFFUSIONZ_E_INTERNAL, "no kernel reads ", c10::toString(dtype));
    }
}

// The stream that work on x's device goes to.
inline cudaStream_t current_stream(const at::Tensor& x) { return c10::cuda::getCurrentCUDAStream(x.device().index()).stream(); }

// Fails with E_DEVICE when a launch was refused.
inline void check_launch(const char* kernel, cudaError_t error) {
    if (error != cudaSuccess) fail(DIFFUSIONZ_E_DEVICE, "kernel ", kernel, ": ", cudaGetErrorString(error));
}

}  // namespace diffusionz

#endif
