#include "image/metadata.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/json_depth.h"

namespace diffusionz {
namespace {

using nlohmann::json;

// The shortest text of a number that reads back as the same float: 4.2, not 4.19999981. Whole numbers come without a point.
std::string number_text(const json& value) {
    if (value.is_number_integer()) return value.dump();
    char text[32];
    const auto end = std::to_chars(text, text + sizeof(text), value.get<float>()).ptr;
    return std::string(text, end);
}

// A value in the settings line. One that has a comma, colon or newline is quoted like JSON, as A1111 does.
std::string setting_text(const json& value) {
    if (value.is_number()) return number_text(value);
    if (!value.is_string()) return value.dump();
    const auto& text = value.get_ref<const std::string&>();
    return text.find_first_of(",:\n\"") == text.npos ? text : value.dump();
}

void append_utf8(std::string& out, uint32_t point) {
    if (point < 0x80) {
        out += static_cast<char>(point);
    } else if (point < 0x800) {
        out += static_cast<char>(0xC0 | point >> 6);
        out += static_cast<char>(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
        out += static_cast<char>(0xE0 | point >> 12);
        out += static_cast<char>(0x80 | (point >> 6 & 0x3F));
        out += static_cast<char>(0x80 | (point & 0x3F));
    } else {
        out += static_cast<char>(0xF0 | point >> 18);
        out += static_cast<char>(0x80 | (point >> 12 & 0x3F));
        out += static_cast<char>(0x80 | (point >> 6 & 0x3F));
        out += static_cast<char>(0x80 | (point & 0x3F));
    }
}

// Well-formed UTF-8 to big-endian UTF-16.
std::string utf16_of_utf8(std::string_view text) {
    std::string out;
    auto append = [&](uint32_t unit) {
        out += static_cast<char>(unit >> 8);
        out += static_cast<char>(unit);
    };
    for (size_t i = 0; i < text.size();) {
        const auto lead = static_cast<uint8_t>(text[i]);
        const int length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
        uint32_t point = length == 1 ? lead : lead & (0x7F >> length);
        for (int k = 1; k < length; ++k) point = point << 6 | (static_cast<uint8_t>(text[i + k]) & 0x3F);
        i += length;
        if (point < 0x10000) {
            append(point);
        } else {
            append(0xD800 | (point - 0x10000) >> 10);
            append(0xDC00 | ((point - 0x10000) & 0x3FF));
        }
    }
    return out;
}

// UTF-16 to UTF-8. Half of a surrogate pair becomes U+FFFD, and the text ends at a NUL.
std::string utf8_of_utf16(Bytes text, bool big_endian) {
    std::string out;
    auto unit_at = [&](size_t i) -> uint32_t {
        if (i + 1 >= text.size()) return 0;
        return big_endian ? text[i] << 8 | text[i + 1] : text[i + 1] << 8 | text[i];
    };
    for (size_t i = 0; i + 1 < text.size(); i += 2) {
        uint32_t point = unit_at(i);
        if (point == 0) break;
        if (point >= 0xD800 && point < 0xE000) {
            const uint32_t low = unit_at(i + 2);
            if (point < 0xDC00 && low >= 0xDC00 && low < 0xE000) {
                point = 0x10000 + ((point - 0xD800) << 10 | (low - 0xDC00));
                i += 2;
            } else {
                point = 0xFFFD;
            }
        }
        append_utf8(out, point);
    }
    return out;
}

// Reads numbers of a TIFF; outside of the bytes all are 0.
class Tiff {
public:
    Tiff(Bytes bytes, bool big_endian) : bytes_(bytes), big_endian_(big_endian) {}

    uint32_t number(size_t offset, size_t width) const {
        if (offset > bytes_.size() || width > bytes_.size() - offset) return 0;
        uint32_t value = 0;
        for (size_t i = 0; i < width; ++i) value = value << 8 | bytes_[offset + (big_endian_ ? i : width - 1 - i)];
        return value;
    }

    // Offset of the entry of `tag` in the directory at `directory`; 0 when there is none.
    size_t find(size_t directory, uint32_t tag) const {
        const uint32_t count = directory == 0 ? 0 : number(directory, 2);
        for (uint32_t i = 0; i < count; ++i)
            if (number(directory + 2 + 12 * size_t{i}, 2) == tag) return directory + 2 + 12 * size_t{i};
        return 0;
    }

private:
    Bytes bytes_;
    bool big_endian_;
};

constexpr uint32_t kExifDirectoryTag = 0x8769;
constexpr uint32_t kUserCommentTag = 0x9286;
constexpr std::string_view kXmpOpen = "<diffusionz:parameters>";
constexpr std::string_view kXmpClose = "</diffusionz:parameters>";

}  // namespace

bool is_json_object(const std::string& text) {
    const size_t first = text.find_first_not_of(" \t\r\n");
    return first != text.npos && text[first] == '{' && json::accept(text);
}

std::string parameters_text(const std::string& metadata_json) {
    if (metadata_json.size() > kMetadataBytesMax)
        fail(DIFFUSIONZ_E_ARGUMENT, "the metadata has ", metadata_json.size(), " bytes; at most ", kMetadataBytesMax,
             " are allowed");
    if (json_too_deep(metadata_json))
        fail(DIFFUSIONZ_E_ARGUMENT, "the metadata is nested deeper than ", kJsonDepthMax, " levels");
    const json metadata = json::parse(metadata_json, nullptr, false);
    // The parser skips a byte order mark, which reading does not.
    if (!is_json_object(metadata_json))
        fail(DIFFUSIONZ_E_ARGUMENT, "the metadata is not a JSON object: ", metadata_json.substr(0, 80));

    auto get = [&](const char* key) -> const json& {
        static const json absent;
        const auto found = metadata.find(key);
        return found == metadata.end() ? absent : *found;
    };
    std::string text;
    if (get("parameters").is_string()) {
        text = get("parameters").get<std::string>();
    } else if (get("prompt").is_string()) {
        text = get("prompt").get<std::string>();
        if (get("lora").is_string() && get("lora_weight").is_number()) {
            auto name = get("lora").get<std::string>();
            if (name.ends_with(".safetensors")) name.resize(name.rfind('.'));
            text += concat(" <lora:", name, ":", number_text(get("lora_weight")), ">");
        }
        if (get("negative_prompt").is_string() && get("negative_prompt") != "")
            text += "\nNegative prompt: " + get("negative_prompt").get<std::string>();

        std::string settings;
        auto add = [&](const char* name, const std::string& value) {
            settings += concat(settings.empty() ? "" : ", ", name, ": ", value);
        };
        auto add_key = [&](const char* name, const char* key) {
            if (!get(key).is_null()) add(name, setting_text(get(key)));
        };
        add_key("Steps", "steps");
        add("Sampler", "Euler");
        // Ours is diffusers' for Z-Image, pos + scale * (pos - neg), where 0 is off. A1111's is neg + scale * (pos - neg),
        // where 1 is off: one more.
        if (get("guidance_scale").is_number()) add("CFG scale", number_text(get("guidance_scale").get<double>() + 1));
        add_key("Seed", "seed");
        if (!get("width").is_null() && !get("height").is_null())
            add("Size", setting_text(get("width")) + "x" + setting_text(get("height")));
        add_key("Model", "model");
        add_key("Denoising strength", "strength");
        add_key("Version", "version");
        text += "\n" + settings;
    }
    // A chunk of text ends at a NUL.
    std::replace(text.begin(), text.end(), '\0', ' ');
    return text;
}

std::string parameters_object(const std::string& text) {
    return json{{"parameters", text}}.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::string exif_with_comment(std::string_view text) {
    std::string out;
    auto append = [&](uint32_t value, int width) {
        while (width > 0) out += static_cast<char>(value >> 8 * --width);
    };
    const std::string comment = std::string("UNICODE\0", 8) + utf16_of_utf8(text);
    out += "MM";
    append(42, 2);
    append(8, 4);  // where the first directory lies
    append(1, 2);  // its only entry: where the Exif directory lies
    append(kExifDirectoryTag, 2);
    append(4, 2);  // LONG
    append(1, 4);
    append(26, 4);
    append(0, 4);  // no next directory
    append(1, 2);
    append(kUserCommentTag, 2);
    append(7, 2);  // UNDEFINED
    append(static_cast<uint32_t>(comment.size()), 4);
    append(44, 4);
    append(0, 4);
    return out + comment;
}

std::string exif_comment(Bytes exif) {
    auto begins = [](Bytes bytes, std::string_view text) {
        return bytes.size() >= text.size() && std::equal(text.begin(), text.end(), bytes.begin());
    };
    using namespace std::string_view_literals;
    // JPEG's marker, which some writers leave in front.
    if (begins(exif, "Exif\0\0"sv)) exif = exif.subspan(6);
    if (!begins(exif, "MM\0*"sv) && !begins(exif, "II*\0"sv)) return "";
    const bool big_endian = exif[0] == 'M';
    const Tiff tiff(exif, big_endian);
    const size_t directory = tiff.find(tiff.number(4, 4), kExifDirectoryTag);
    const size_t entry = directory == 0 ? 0 : tiff.find(tiff.number(directory + 8, 4), kUserCommentTag);
    if (entry == 0) return "";
    const size_t size = tiff.number(entry + 4, 4), offset = tiff.number(entry + 8, 4);
    if (size < 8 || offset > exif.size() || size > exif.size() - offset) return "";
    const Bytes code = exif.subspan(offset, 8), comment = exif.subspan(offset + 8, size - 8);
    if (begins(code, "UNICODE\0"sv)) return utf8_of_utf16(comment, big_endian);
    if (!begins(code, "ASCII\0\0\0"sv) && !begins(code, "\0\0\0\0\0\0\0\0"sv)) return "";
    return std::string(comment.begin(), std::find(comment.begin(), comment.end(), 0));
}

std::string xmp_with_json(std::string_view metadata_json) {
    std::string escaped;
    for (char c : metadata_json) {
        if (c == '&')
            escaped += "&amp;";
        else if (c == '<')
            escaped += "&lt;";
        else if (c == '>')
            escaped += "&gt;";
        else if (c == '\r')
            escaped += "&#13;";  // XML would read it as \n
        else
            escaped += c;
    }
    return concat("<?xpacket begin=\"\xEF\xBB\xBF\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?>\n",
                  "<x:xmpmeta xmlns:x=\"adobe:ns:meta/\"><rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\">",
                  "<rdf:Description rdf:about=\"\" xmlns:diffusionz=\"urn:diffusionz\">", kXmpOpen, escaped, kXmpClose,
                  "</rdf:Description></rdf:RDF></x:xmpmeta>\n<?xpacket end=\"r\"?>");
}

std::string xmp_json(std::string_view xmp) {
    const size_t begin = xmp.find(kXmpOpen);
    const size_t end = xmp.find(kXmpClose);
    if (begin == xmp.npos || end == xmp.npos || end < begin + kXmpOpen.size()) return "";
    std::string_view escaped = xmp.substr(begin + kXmpOpen.size(), end - begin - kXmpOpen.size());
    std::string text;
    while (!escaped.empty()) {
        static constexpr std::pair<std::string_view, char> kEntities[] = {{"&amp;", '&'},  {"&lt;", '<'},   {"&gt;", '>'},
                                                                          {"&#13;", '\r'}, {"&quot;", '"'}, {"&apos;", '\''}};
        const auto* entity =
            std::find_if(std::begin(kEntities), std::end(kEntities), [&](auto& one) { return escaped.starts_with(one.first); });
        text += entity == std::end(kEntities) ? escaped[0] : entity->second;
        escaped.remove_prefix(entity == std::end(kEntities) ? 1 : entity->first.size());
    }
    return text;
}

std::string utf8_of_latin1(std::string_view text) {
    std::string out;
    for (char c : text) append_utf8(out, static_cast<uint8_t>(c));
    return out;
}

}  // namespace diffusionz
