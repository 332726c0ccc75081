// Launches that may overlap the end of the kernel before them.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

namespace diffusionz::kernels {

// The attribute of a launch whose blocks take their places while the last ones of the kernel before it still run (programmatic
// dependent launch), in a captured graph, too.
inline cudaLaunchAttribute overlap_attribute() {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    return overlap;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_with(cudaLaunchAttribute* attributes, unsigned attribute_count, void (*kernel)(Parameters...), dim3 blocks,
                        int threads, size_t shared_bytes, cudaStream_t stream, Arguments&&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = static_cast<unsigned>(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = attribute_count;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
    cudaGetLastError();  // what was refused is told once
    return error;
}

// Launches a kernel that calls wait_for_the_kernel_before(). With `overlapped`, from compute capability 9.0 on, it overlaps the end
// of the kernel before.
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
    cudaLaunchAttribute overlap = overlap_attribute();
    return launch_with(&overlap, overlapped ? 1 : 0, kernel, blocks, threads, shared_bytes, stream,
                       std::forward<Arguments>(arguments)...);
}

// The same for a kernel whose blocks form clusters of `cluster` neighbours along x: compute capability 9.0 on, always overlapped.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(unsigned cluster, void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared_bytes,
                            cudaStream_t stream, Arguments&&... arguments) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {cluster, 1, 1};
    attributes[1] = overlap_attribute();
    return launch_with(attributes, 2, kernel, blocks, threads, shared_bytes, stream, std::forward<Arguments>(arguments)...);
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
