// image_probe: the picture functions, one call a run. Files in and out; an error is one line on standard error, exit status 1.
//
//   image_probe encode webp|webp_lossless|png WIDTH HEIGHT QUALITY RGB.bin METADATA.json|- OUT
//   image_probe decode IN OUT.bin        prints "WIDTH HEIGHT"
//   image_probe metadata IN              prints the JSON
//   image_probe check FILE...            decodes and reads the metadata of each: one line a file, "ok" or the error
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "core/error.h"
#include "image/image.h"
#include "image/png.h"
#include "image/webp.h"

namespace {

std::vector<uint8_t> read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("cannot read " + path);
    return {std::istreambuf_iterator<char>(file), {}};
}

void write(const std::string& path, const std::vector<uint8_t>& bytes) {
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    if (!file) throw std::runtime_error("cannot write " + path);
}

int run(const std::vector<std::string>& args) {
    using namespace diffusionz;
    const std::string command = args.empty() ? "" : args[0];
    if (command == "encode" && args.size() == 8) {
        const int32_t width = std::stoi(args[2]), height = std::stoi(args[3]), quality = std::stoi(args[4]);
        const auto rgb = read(args[5]);
        const auto json = args[6] == "-" ? std::vector<uint8_t>() : read(args[6]);
        const std::string metadata(json.begin(), json.end());
        write(args[7], args[1] == "png" ? encode_png(rgb.data(), width, height, metadata)
                                        : encode_webp(rgb.data(), width, height, args[1] == "webp_lossless", quality, metadata));
    } else if (command == "decode" && args.size() == 3) {
        const Rgb image = decode_image(read(args[1]));
        std::cout << image.width << ' ' << image.height << '\n';
        write(args[2], image.pixels);
    } else if (command == "metadata" && args.size() == 2) {
        std::cout << read_metadata(read(args[1]));
    } else if (command == "check") {
        for (size_t i = 1; i < args.size(); ++i) {
            const auto bytes = read(args[i]);
            std::string line = "ok";
            try {
                decode_image(bytes);
                read_metadata(bytes);
            } catch (const Error& error) {
                line = error.status() == DIFFUSIONZ_E_IMAGE ? error.what() : concat("status ", error.status());
            }
            std::cout << line << '\n';
        }
    } else {
        std::cerr << "usage: see the head of tests/probe/image_probe.cc\n";
        return 2;
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        return run({argv + 1, argv + argc});
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
