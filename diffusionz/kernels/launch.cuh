// Launches that may overlap the end of the kernel before them.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace diffusionz::kernels {

// Launches a kernel that calls wait_for_the_kernel_before(). With `overlapped`, from compute capability 9.0 on, its blocks take their
// places while the last ones of the kernel before it still run (programmatic dependent launch), in a captured graph, too.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared_bytes, cudaStream_t stream, bool overlapped,
                   Arguments&&... arguments) {
    if (overlapped) {
        int device = 0, major = 0;
        cudaError_t error = cudaGetDevice(&device);
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        if (error != cudaSuccess) return error;
        overlapped = major >= 9;
    }
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = static_cast<unsigned>(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = overlapped ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
    cudaGetLastError();  // what was refused is told once
    return error;
}

// Until all that earlier kernels wrote is there. What they write must not be read before, nor what they read be written.
__device__ inline void wait_for_the_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may take their places once every block of this one has come here, or has ended.
__device__ inline void start_the_kernel_after() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace diffusionz::kernels
