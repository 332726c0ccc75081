// The devices of this machine.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <exception>
#include <string>

#include "diffusionz_c_api.h"

namespace diffusionz {

// CUDA devices; 0 where the library was built without CUDA.
int32_t cuda_device_count();

// -1 the CPU. Fails with E_DEVICE for a device that is not there.
at::Device find_device(int32_t device_id);

// Bytes of host memory that a process could have without swapping.
int64_t host_free_memory();

void describe_device(int32_t device_id, DiffusionZDeviceInfo& info);

// Adds what this process uses of a CUDA device's memory; nothing for the CPU.
void add_device_memory(at::Device device, DiffusionZMemoryInfo& info);

// Gives back what LibTorch keeps of every CUDA device's memory for later allocations.
void release_kept_memory();

// From now on this process gets at most that many bytes of a CUDA device; nothing for the CPU.
void limit_device_memory(at::Device device, int64_t max_bytes);

// Whose memory has run out, as LibTorch, CUDA's libraries or the C++ runtime say it.
enum class OutOfMemory { no, host, device };
OutOfMemory out_of_memory(const std::exception& error);

// After a failure for want of device memory: gives back what was kept for later calls on every device, and puts LibTorch's
// message into our words: how much was wanted, free and held.
std::string after_out_of_memory(const std::string& message);

// Waits for the device and raises what it reports.
void synchronize(at::Device device);

}  // namespace diffusionz
