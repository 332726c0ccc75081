#include "core/device.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <regex>
#include <string>

#include "core/error.h"

#ifdef DIFFUSIONZ_WITH_CUDA
#include <ATen/Context.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>
#endif

namespace diffusionz {
namespace {

// A line "key : value" of a /proc file, "" when there is none.
std::string proc_value(const char* file, const std::string& key) {
    std::ifstream lines(file);
    for (std::string line; std::getline(lines, line);) {
        if (line.rfind(key, 0) != 0) continue;
        const size_t begin = line.find_first_not_of(" \t", line.find(':') + 1);
        return begin == std::string::npos ? "" : line.substr(begin);
    }
    return "";
}

}  // namespace

int32_t cuda_device_count() {
#ifdef DIFFUSIONZ_WITH_CUDA
    return c10::cuda::device_count();  // 0, without an exception, where there is no driver
#else
    return 0;
#endif
}

at::Device find_device(int32_t device_id) {
    if (device_id == -1) return at::Device(at::kCPU);
    const int32_t count = cuda_device_count();
    if (device_id < -1 || device_id >= count) {
#ifdef DIFFUSIONZ_WITH_CUDA
        fail(DIFFUSIONZ_E_DEVICE, "device_id is ", device_id, "; allowed are -1 (the CPU) and 0 to ", count - 1,
             " (CUDA devices here: ", count, ")");
#else
        fail(DIFFUSIONZ_E_DEVICE, "device_id is ", device_id,
             "; this library was built without CUDA: only -1, the CPU, is allowed");
#endif
    }
    return at::Device(at::kCUDA, static_cast<at::DeviceIndex>(device_id));
}

int64_t host_free_memory() {
    // "MemAvailable: 123 kB" counts caches that the kernel would give back.
    const std::string available = proc_value("/proc/meminfo", "MemAvailable");
    return available.empty() ? ::sysconf(_SC_PAGESIZE) * ::sysconf(_SC_AVPHYS_PAGES) : std::stoll(available) * 1024;
}

void describe_device(int32_t device_id, DiffusionZDeviceInfo& info) {
    const at::Device device = find_device(device_id);
    info.device_id = device_id;
    std::string name;
    if (device.is_cpu()) {
        name = proc_value("/proc/cpuinfo", "model name");
        info.memory_total_bytes = ::sysconf(_SC_PAGESIZE) * ::sysconf(_SC_PHYS_PAGES);
        info.memory_free_bytes = host_free_memory();
        info.compute_capability = 0;
    }
#ifdef DIFFUSIONZ_WITH_CUDA
    if (device.is_cuda()) {
        cudaDeviceProp properties{};
        size_t free_bytes = 0, total_bytes = 0;
        const c10::DeviceIndex before = c10::cuda::current_device();
        c10::cuda::set_device(device.index());
        cudaError_t error = cudaGetDeviceProperties(&properties, device.index());
        if (error == cudaSuccess) error = cudaMemGetInfo(&free_bytes, &total_bytes);
        c10::cuda::set_device(before);
        if (error != cudaSuccess) fail(DIFFUSIONZ_E_DEVICE, "CUDA device ", device_id, ": ", cudaGetErrorString(error));
        name = properties.name;
        info.memory_total_bytes = static_cast<int64_t>(total_bytes);
        info.memory_free_bytes = static_cast<int64_t>(free_bytes);
        info.compute_capability = properties.major * 10 + properties.minor;
    }
#endif
    std::snprintf(info.name, sizeof info.name, "%s", name.c_str());
}

void add_device_memory(at::Device device, DiffusionZMemoryInfo& info) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (!device.is_cuda()) return;
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device.index());
    const auto& used = stats.allocated_bytes[0];  // of blocks of every size
    info.device_bytes += used.current;
    info.device_peak_bytes += used.peak;
    info.device_held_bytes += stats.reserved_bytes[0].current;
#else
    (void)device;
    (void)info;
#endif
}

void release_kept_memory() {
#ifdef DIFFUSIONZ_WITH_CUDA
    c10::cuda::CUDACachingAllocator::emptyCache();
#endif
}

void limit_device_memory(at::Device device, int64_t max_bytes) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (!device.is_cuda()) return;
    at::globalContext().lazyInitDevice(at::kCUDA);  // the allocator's, too
    DiffusionZDeviceInfo info{};
    describe_device(device.index(), info);
    const double share = static_cast<double>(max_bytes) / static_cast<double>(info.memory_total_bytes);
    c10::cuda::CUDACachingAllocator::setMemoryFraction(std::min(share, 1.0), device.index());
#else
    (void)device;
    (void)max_bytes;
#endif
}

OutOfMemory out_of_memory(const std::exception& error) {
    if (dynamic_cast<const std::bad_alloc*>(&error)) return OutOfMemory::host;
    if (dynamic_cast<const c10::OutOfMemoryError*>(&error)) return OutOfMemory::device;
    // oneDNN's error, whose type LibTorch does not export: shapes that it cannot do are LibTorch's to avoid, so what keeps it from making
    // something is memory for its code or its tables.
    if (std::string_view(error.what()).starts_with("could not create a")) return OutOfMemory::host;
    const auto* torch = dynamic_cast<const c10::Error*>(&error);
    if (!torch) return OutOfMemory::no;
    const std::string what = torch->what_without_backtrace();
    // LibTorch's host allocator has no type of its own for running out of memory.
    if (what.find("DefaultCPUAllocator") != std::string::npos) return OutOfMemory::host;
    // What CUDA's libraries allocate on their own.
    for (const char* sign : {"CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"}) {
        if (what.find(sign) != std::string::npos) return OutOfMemory::device;
    }
    return OutOfMemory::no;
}

std::string after_out_of_memory(const std::string& message) {
#ifdef DIFFUSIONZ_WITH_CUDA
    release_kept_memory();
    const auto found = [&](const char* pattern) {
        std::smatch match;
        return std::regex_search(message, match, std::regex(pattern)) ? match[1].str() : std::string();
    };
    const std::string wanted = found("Tried to allocate ([0-9.]+ [A-Za-z]+)"), device = found("GPU (\\d+)"),
                      free = found("of which ([0-9.]+ [A-Za-z]+) is free"),
                      used = found("([0-9.]+ [A-Za-z]+) is allocated by PyTorch"),
                      kept = found("([0-9.]+ [A-Za-z]+) is reserved by PyTorch"), limit = found("([0-9.]+ [A-Za-z]+) allowed");
    if (!wanted.empty() && !free.empty() && !used.empty()) {
        return concat("cuda:", device, " is out of memory: ", wanted, " more were wanted; ", free,
                      " are free, this process uses ", used, " and kept ", kept.empty() ? "nothing" : kept, " for later",
                      limit.empty() ? "" : concat("; its limit (max_vram_bytes) is ", limit));
    }
#endif
    return message;
}

void synchronize(at::Device device) {
#ifdef DIFFUSIONZ_WITH_CUDA
    if (device.is_cuda()) c10::cuda::device_synchronize();
#else
    (void)device;
#endif
}

}  // namespace diffusionz
