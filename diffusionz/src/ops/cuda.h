// Between ATen and the kernels: types, rows, the current stream, and faults. Launches go to the current device, which whoever
// chose the stream has made that of the tensors.
#pragma once

#ifdef DIFFUSIONZ_WITH_CUDA

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>

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

inline bool has_kernel_type(at::ScalarType dtype) { return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16; }
inline bool has_kernel_type(const at::Tensor& x) { return has_kernel_type(x.scalar_type()); }

// Whether `parameter`, where there is one, is of x's dtype, and its last dimension as long as x's and without gaps.
inline bool goes_with(const at::Tensor& parameter, const at::Tensor& x) {
    return !parameter.defined() ||
           (parameter.scalar_type() == x.scalar_type() && parameter.size(-1) == x.size(-1) && parameter.stride(-1) == 1);
}

// The data of a tensor that may be undefined.
inline const void* data_of(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }

// x [batch, tokens, width] as rows.
inline kernels::Rows rows_of(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

// factors [batch or 1, 1, width], or undefined.
inline kernels::Factors factors_of(const at::Tensor& factors) {
    return {data_of(factors), factors.defined() && factors.size(0) > 1 ? factors.stride(0) : 0};
}

// x [..., width] as [batch, tokens, width] without a copy; none where its rows lie too irregularly.
inline std::optional<at::Tensor> as_batched_rows(const at::Tensor& x) {
    if (x.stride(-1) != 1) return std::nullopt;
    at::DimVector sizes, strides;  // of the dimensions before the last, with neighbours merged where one stride walks both
    for (int64_t i = 0; i + 1 < x.dim(); ++i) {
        if (x.size(i) == 1) continue;
        if (!sizes.empty() && strides.back() == x.size(i) * x.stride(i)) {
            sizes.back() *= x.size(i);
            strides.back() = x.stride(i);
        } else {
            sizes.push_back(x.size(i));
            strides.push_back(x.stride(i));
        }
    }
    if (sizes.size() > 2) return std::nullopt;
    while (sizes.size() < 2) sizes.insert(sizes.begin(), 1), strides.insert(strides.begin(), 0);
    return x.as_strided({sizes[0], sizes[1], x.size(-1)}, {strides[0], strides[1], 1});
}

// The stream that work on x's device goes to.
inline cudaStream_t current_stream(const at::Tensor& x) { return c10::cuda::getCurrentCUDAStream(x.device().index()).stream(); }

// What x's device is, as CUDA counts it.
inline int device_attribute(const at::Tensor& x, cudaDeviceAttr name) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, name, x.device().index());
    if (error != cudaSuccess) fail(DIFFUSIONZ_E_DEVICE, "CUDA: ", cudaGetErrorString(error));
    return value;
}

// 10 major + minor.
inline int compute_capability(const at::Tensor& x) {
    return 10 * device_attribute(x, cudaDevAttrComputeCapabilityMajor) + device_attribute(x, cudaDevAttrComputeCapabilityMinor);
}

// Fails with E_DEVICE when a launch was refused.
inline void check_launch(const char* kernel, cudaError_t error) {
    if (error != cudaSuccess) fail(DIFFUSIONZ_E_DEVICE, "kernel ", kernel, ": ", cudaGetErrorString(error));
}

// The same, but false when the kernel has no path for such an input and nothing was launched.
inline bool launched(const char* kernel, cudaError_t error) {
    if (error == cudaErrorNotSupported) return false;
    check_launch(kernel, error);
    return true;
}

}  // namespace diffusionz

#endif
