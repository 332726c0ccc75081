// The devices of this machine.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>

#include "diffusionz_c_api.h"

namespace diffusionz {

// CUDA devices; 0 where the library was built without CUDA.
int32_t cuda_device_count();

// -1 the CPU. Fails with E_DEVICE for a device that is not there.
at::Device find_device(int32_t device_id);

// Bytes of host memory that a process could have without swapping.
int64_t host_free_memory();

void describe_device(int32_t device_id, DiffusionZDeviceInfo& info);

// Waits for the device and raises what it reports.
void synchronize(at::Device device);

}  // namespace diffusionz
