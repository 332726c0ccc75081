#include "c_api/arguments.h"

#include <optional>

#include "core/device.h"

namespace diffusionz {
namespace {

struct PrecisionRow {
    const char* name;
    Placement how;  // but for the device
    bool zimage, chronos;
    int32_t compute_capability_min;  // -1: the CPU, too
};

// By DIFFUSIONZ_PRECISION_*, from FLOAT32 on.
constexpr int32_t kFirst = DIFFUSIONZ_PRECISION_FLOAT32;
const PrecisionRow kPrecisions[] = {
    {"FLOAT32", {at::kCPU, at::kFloat, Products::plain}, true, true, -1},
    {"BFLOAT16", {at::kCPU, at::kBFloat16, Products::plain}, true, true, -1},
    {"FP8", {at::kCPU, at::kBFloat16, Products::fp8}, true, false, 89},
    {"FLOAT16", {at::kCPU, at::kHalf, Products::plain}, false, true, -1},
    {"TF32", {at::kCPU, at::kFloat, Products::tf32}, false, true, 80},
};

bool knows(Family family, const PrecisionRow& row) { return family == Family::zimage ? row.zimage : row.chronos; }

}  // namespace

Placement placement_of(int32_t device_id, int32_t precision, Family family) {
    const at::Device device = find_device(device_id);
    if (precision == DIFFUSIONZ_PRECISION_AUTO)
        precision = family == Family::zimage && device.is_cuda() ? DIFFUSIONZ_PRECISION_BFLOAT16 : DIFFUSIONZ_PRECISION_FLOAT32;
    const int64_t index = int64_t{precision} - kFirst;
    if (index < 0 || index >= std::ssize(kPrecisions) || !knows(family, kPrecisions[index])) {
        std::string allowed = "AUTO (0)";
        for (int32_t i = 0; i < std::ssize(kPrecisions); ++i) {
            if (knows(family, kPrecisions[i])) allowed += concat(", ", kPrecisions[i].name, " (", kFirst + i, ')');
        }
        fail(DIFFUSIONZ_E_ARGUMENT, "precision is ", precision, "; of DIFFUSIONZ_PRECISION_*, ",
             family == Family::zimage ? "Z-Image" : "Chronos-2", " knows ", allowed);
    }
    const PrecisionRow& row = kPrecisions[index];
    DiffusionZDeviceInfo info{};
    if (row.compute_capability_min > 0) describe_device(device_id, info);
    if (info.compute_capability < row.compute_capability_min) {
        const auto dotted = [](int32_t capability) { return concat(capability / 10, '.', capability % 10); };
        fail(DIFFUSIONZ_E_DEVICE, "precision is ", row.name, " (", precision, "); it needs a CUDA device of compute capability ",
             dotted(row.compute_capability_min), " or later, and ", device.str(), " (", info.name, ") is ",
             device.is_cpu() ? "none" : concat("of ", dotted(info.compute_capability)));
    }
    Placement placement = row.how;
    placement.device = device;
    return placement;
}

}  // namespace diffusionz
