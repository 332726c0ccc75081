#include "core/safetensors.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "core/error.h"

namespace diffusionz {
namespace {

constexpr uint64_t kHeaderBytesMax = 100'000'000;  // the reference implementation's limit
constexpr size_t kRankMax = 8;

struct DtypeRow {
    const char* name;
    Dtype dtype;
    uint64_t size_bytes;
};
constexpr DtypeRow kDtypes[] = {
    {"F64", Dtype::float64, 8}, {"F32", Dtype::float32, 4},   {"F16", Dtype::float16, 2},   {"BF16", Dtype::bfloat16, 2},
    {"I64", Dtype::other, 8},   {"I32", Dtype::other, 4},     {"I16", Dtype::other, 2},     {"I8", Dtype::other, 1},
    {"U64", Dtype::other, 8},   {"U32", Dtype::other, 4},     {"U16", Dtype::other, 2},     {"U8", Dtype::other, 1},
    {"BOOL", Dtype::other, 1},  {"F8_E4M3", Dtype::other, 1}, {"F8_E5M2", Dtype::other, 1}, {"F8_E8M0", Dtype::other, 1},
};

uint64_t little_endian_64(const char* bytes) {
    uint64_t value = 0;
    for (int i = 7; i >= 0; --i) value = value << 8 | static_cast<uint8_t>(bytes[i]);
    return value;
}

}  // namespace

std::string shape_text(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

TensorView TensorView::rows(int64_t begin, int64_t count) const {
    TensorView view = *this;
    const size_t row_bytes = size_bytes / static_cast<size_t>(shape.at(0));
    view.shape[0] = count;
    view.data += row_bytes * static_cast<size_t>(begin);
    view.size_bytes = row_bytes * static_cast<size_t>(count);
    return view;
}

SafetensorsFile read_safetensors(std::string_view file, const std::string& name, int32_t status) {
    if (file.size() < 8) fail(status, name, ": ", file.size(), " bytes is too short for a safetensors file");
    const uint64_t header_bytes = little_endian_64(file.data());
    if (header_bytes > kHeaderBytesMax || header_bytes > file.size() - 8) {
        fail(status, name, ": the header claims ", header_bytes, " bytes, the file has ", file.size() - 8,
             " after its length; truncated or no safetensors file");
    }
    const std::string_view header_text = file.substr(8, header_bytes);
    const std::string_view body = file.substr(8 + header_bytes);
    const auto header = nlohmann::json::parse(header_text.begin(), header_text.end(), nullptr, /*allow_exceptions=*/false);
    if (!header.is_object()) fail(status, name, ": the header is not a JSON object");

    SafetensorsFile result;
    std::vector<std::pair<uint64_t, uint64_t>> ranges;
    for (const auto& [key, entry] : header.items()) {
        if (key == "__metadata__") {
            for (const auto& [name_of, value] : entry.items()) {
                if (value.is_string()) result.metadata[name_of] = value.get<std::string>();
            }
            continue;
        }
        const auto refuse = [&](const std::string& why) { fail(status, name, ": tensor '", key, "': ", why); };
        if (!entry.is_object() || !entry.contains("dtype") || !entry["dtype"].is_string() || !entry.contains("shape") ||
            !entry["shape"].is_array() || !entry.contains("data_offsets") || !entry["data_offsets"].is_array() ||
            entry["data_offsets"].size() != 2) {
            refuse("its entry needs dtype, shape and two data_offsets");
        }
        TensorView view;
        view.dtype_name = entry["dtype"].get<std::string>();
        const auto row =
            std::find_if(std::begin(kDtypes), std::end(kDtypes), [&](const DtypeRow& r) { return view.dtype_name == r.name; });
        if (row == std::end(kDtypes)) refuse("unknown dtype " + view.dtype_name);
        view.dtype = row->dtype;

        uint64_t expected = row->size_bytes;
        if (entry["shape"].size() > kRankMax) refuse("it has more than 8 dimensions");
        for (const auto& extent : entry["shape"]) {
            if (!extent.is_number_unsigned()) refuse("its shape is not a list of sizes");
            const uint64_t value = extent.get<uint64_t>();
            if (value > INT64_MAX || __builtin_mul_overflow(expected, value, &expected)) refuse("its shape overflows");
            view.shape.push_back(static_cast<int64_t>(value));
        }
        const auto& offsets = entry["data_offsets"];
        if (!offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned()) refuse("its data_offsets are not sizes");
        const uint64_t begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
        if (begin > end || end > body.size()) {
            refuse(concat("data_offsets [", begin, ", ", end, "] lie outside the ", body.size(), " bytes of data; truncated?"));
        }
        if (end - begin != expected) {
            refuse(concat(view.dtype_name, ' ', shape_text(view.shape), " needs ", expected, " bytes, its data_offsets give ",
                          end - begin));
        }
        view.data = reinterpret_cast<const uint8_t*>(body.data()) + begin;
        view.size_bytes = end - begin;
        if (begin != end) ranges.emplace_back(begin, end);
        result.tensors.emplace(key, std::move(view));
    }
    std::sort(ranges.begin(), ranges.end());
    for (size_t i = 1; i < ranges.size(); ++i) {
        if (ranges[i].first < ranges[i - 1].second) fail(status, name, ": two tensors share the bytes at ", ranges[i].first);
    }
    return result;
}

}  // namespace diffusionz
