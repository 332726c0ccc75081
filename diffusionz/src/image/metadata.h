// Generation parameters inside a picture, in the forms that other tools read.
//
// The engine gives one JSON object. A picture carries it twice: as it is, for diffusionz; and as the one `parameters` text that
// AUTOMATIC1111's web UI began and that Civitai and most viewers read.
//
//   PNG:  an iTXt chunk `diffusionz` with the JSON, a chunk `parameters` with the text, tEXt when it is ASCII, else iTXt
//   WebP: XMP with the JSON, EXIF UserComment with the text
#pragma once

#include <string>
#include <string_view>

#include "image/image.h"

namespace diffusionz {

// The A1111 text of a JSON object of generation parameters:
//
//   {prompt} <lora:{lora, without .safetensors}:{lora_weight}>
//   Negative prompt: {negative_prompt}
//   Steps: {steps}, Sampler: Euler, CFG scale: {guidance_scale + 1}, Seed: {seed}, Size: {width}x{height}, Model: {model},
//   Denoising strength: {strength}, Version: {version}          (one line with the one above)
//
// Keys that are absent or null are left out. A string `parameters` is taken as it is, in place of all others; without it and
// without `prompt` the text is "". Fails with E_ARGUMENT when `metadata_json` is not a JSON object, or is too long.
std::string parameters_text(const std::string& metadata_json);

// {"parameters": text}, for a picture of another tool. What is not UTF-8 in it becomes U+FFFD.
std::string parameters_object(const std::string& text);

// True when `text` is one JSON object.
bool is_json_object(const std::string& text);

// An EXIF block (big-endian TIFF) whose UserComment is the UTF-8 `text`, and the way back: "" when there is none.
std::string exif_with_comment(std::string_view text);
std::string exif_comment(Bytes exif);

// An XMP packet that holds the JSON, and the way back: "" when the packet has none of ours.
std::string xmp_with_json(std::string_view metadata_json);
std::string xmp_json(std::string_view xmp);

// Latin-1 to UTF-8; of tEXt chunks.
std::string utf8_of_latin1(std::string_view text);

}  // namespace diffusionz
