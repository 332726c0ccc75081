#include "image/png.h"

#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>

#include "core/error.h"
#include "image/metadata.h"

namespace diffusionz {
namespace {

// A libpng handle for reading or writing, that keeps the error's message and prints nothing.
//
// libpng reports an error by longjmp. All calls that can fail go through attempt(), whose body must hold nothing that has a
// destructor: what owns memory lives in the function that calls attempt().
class Handle {
public:
    explicit Handle(Bytes bytes) : bytes_(bytes) {
        png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, on_error, on_warning);
        create_info();
        png_set_read_fn(png_, this, on_read);
        png_set_user_limits(png_, kImageSideMax, kImageSideMax);
        // Of one chunk, and of a compressed text once it is inflated: JSON and text of the longest metadata.
        png_set_chunk_malloc_max(png_, 2 * kMetadataBytesMax);
    }
    explicit Handle(std::vector<uint8_t>& out) : out_(&out) {
        png_ = png_create_write_struct(PNG_LIBPNG_VER_STRING, this, on_error, on_warning);
        create_info();
        png_set_write_fn(png_, this, on_write, nullptr);
    }
    ~Handle() { destroy(); }
    Handle(const Handle&) = delete;
    Handle& operator=(const Handle&) = delete;

    png_structp png() const { return png_; }
    png_infop info() const { return info_; }

    template <class Body>
    void attempt(Body body) {
        if (!run(body)) {
            if (out_of_memory_) throw std::bad_alloc();
            fail(DIFFUSIONZ_E_IMAGE, "PNG: ", message_);
        }
    }

private:
    void create_info() {
        if (png_) info_ = png_create_info_struct(png_);
        if (info_) return;
        destroy();
        throw std::bad_alloc();
    }
    void destroy() { out_ ? png_destroy_write_struct(&png_, &info_) : png_destroy_read_struct(&png_, &info_, nullptr); }

    template <class Body>
    bool run(Body& body) {
        if (setjmp(png_jmpbuf(png_))) return false;
        body(png_, info_);
        return true;
    }

    [[noreturn]] static void on_error(png_structp png, png_const_charp message) {
        auto* self = static_cast<Handle*>(png_get_error_ptr(png));
        // Names of damaged chunks are in it as they are.
        size_t length = 0;
        for (; message[length] && length + 1 < sizeof(self->message_); ++length)
            self->message_[length] = message[length] >= ' ' && message[length] <= '~' ? message[length] : '?';
        self->message_[length] = '\0';
        png_longjmp(png, 1);
    }
    static void on_warning(png_structp, png_const_charp) {}

    static void on_read(png_structp png, png_bytep target, size_t size) {
        auto* self = static_cast<Handle*>(png_get_io_ptr(png));
        if (size > self->bytes_.size()) png_error(png, "the file ends early");
        std::memcpy(target, self->bytes_.data(), size);
        self->bytes_ = self->bytes_.subspan(size);
    }

    static void on_write(png_structp png, png_bytep source, size_t size) {
        auto* self = static_cast<Handle*>(png_get_io_ptr(png));
        try {
            self->out_->insert(self->out_->end(), source, source + size);
        } catch (const std::bad_alloc&) {
            self->out_of_memory_ = true;
        }
        if (self->out_of_memory_) png_error(png, "out of memory");
    }

    png_structp png_ = nullptr;
    png_infop info_ = nullptr;
    Bytes bytes_;                          // that are left to read
    std::vector<uint8_t>* out_ = nullptr;  // when writing
    bool out_of_memory_ = false;
    char message_[160] = "";
};

// Checks the size before libpng sees it: its message would have no numbers.
void check_header(Bytes bytes) {
    if (bytes.size() < 24) fail(DIFFUSIONZ_E_IMAGE, "PNG: the file ends early, after ", bytes.size(), " bytes");
    auto number = [&](size_t offset) {
        return int64_t{bytes[offset]} << 24 | int64_t{bytes[offset + 1]} << 16 | int64_t{bytes[offset + 2]} << 8 |
               bytes[offset + 3];
    };
    check_image_size("PNG", number(16), number(20), kImageSideMax);
}

// Deflate makes no more than 1032 bytes of one: a few bytes that claim a huge picture are refused before it is allocated.
void check_data_size(const Handle& handle, Bytes bytes) {
    const size_t height = png_get_image_height(handle.png(), handle.info());
    if (png_get_rowbytes(handle.png(), handle.info()) * height / 1032 > bytes.size())
        fail(DIFFUSIONZ_E_IMAGE, "PNG: ", bytes.size(), " bytes are too few for ",
             png_get_image_width(handle.png(), handle.info()), " x ", height);
}

}  // namespace

std::vector<uint8_t> encode_png(const uint8_t* rgb, int32_t width, int32_t height, const std::string& metadata_json) {
    check_image_size("PNG", width, height, kImageSideMax);
    std::string json = metadata_json;
    std::string parameters = metadata_json.empty() ? "" : parameters_text(metadata_json);
    const bool ascii = std::all_of(parameters.begin(), parameters.end(), [](unsigned char c) { return c < 0x80; });

    png_text texts[2] = {};
    int text_count = 0;
    auto add_text = [&](const char* key, std::string& text, int compression) {
        if (text.empty()) return;
        texts[text_count].key = const_cast<char*>(key);
        texts[text_count].text = text.data();
        texts[text_count++].compression = compression;
    };
    add_text("parameters", parameters, ascii ? PNG_TEXT_COMPRESSION_NONE : PNG_ITXT_COMPRESSION_NONE);
    add_text("diffusionz", json, PNG_ITXT_COMPRESSION_NONE);

    std::vector<uint8_t> out;
    Handle handle(out);
    handle.attempt([&](png_structp png, png_infop info) {
        png_set_user_limits(png, kImageSideMax, kImageSideMax);
        png_set_IHDR(png, info, width, height, 8, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT,
                     PNG_FILTER_TYPE_DEFAULT);
        png_set_compression_level(png,
                                  4);  // 6, zlib's own choice, takes 1.7 times as long and saves nothing on a picture like ours
        png_set_text(png, info, texts, text_count);
        png_write_info(png, info);
        for (int32_t y = 0; y < height; ++y) png_write_row(png, rgb + size_t(y) * width * 3);
        png_write_end(png, nullptr);
    });
    return out;
}

Rgb decode_png(Bytes bytes) {
    check_header(bytes);
    Handle handle(bytes);
    handle.attempt([](png_structp png, png_infop info) { png_read_info(png, info); });

    Rgb image;
    image.width = static_cast<int32_t>(png_get_image_width(handle.png(), handle.info()));
    image.height = static_cast<int32_t>(png_get_image_height(handle.png(), handle.info()));
    check_data_size(handle, bytes);

    handle.attempt([](png_structp png, png_infop info) {
        png_set_expand(png);  // palettes, fewer than 8 bits and transparent colours
        png_set_scale_16(png);
        png_set_gray_to_rgb(png);
        png_set_interlace_handling(png);
        png_read_update_info(png, info);
    });
    const size_t row_bytes = png_get_rowbytes(handle.png(), handle.info());
    image.pixels.resize(row_bytes * image.height);
    std::vector<png_bytep> rows(image.height);
    for (int32_t y = 0; y < image.height; ++y) rows[y] = image.pixels.data() + y * row_bytes;
    handle.attempt([&](png_structp png, png_infop) {
        png_read_image(png, rows.data());
        png_read_end(png, nullptr);
    });
    if (row_bytes == size_t(image.width) * 4) composite_over_black(image.pixels);
    return image;
}

std::string read_png_metadata(Bytes bytes) {
    check_header(bytes);
    Handle handle(bytes);
    handle.attempt([](png_structp png, png_infop info) { png_read_info(png, info); });
    check_data_size(handle, bytes);
    // Some writers put text behind the picture, and libpng reaches it only through the rows.
    std::vector<uint8_t> row(png_get_rowbytes(handle.png(), handle.info()));
    handle.attempt([&](png_structp png, png_infop info) {
        const int pass_count = png_set_interlace_handling(png);
        const png_uint_32 height = png_get_image_height(png, info);
        for (int pass = 0; pass < pass_count; ++pass)
            for (png_uint_32 y = 0; y < height; ++y) png_read_row(png, row.data(), nullptr);
        png_read_end(png, info);
    });
    png_textp texts = nullptr;
    const int count = png_get_text(handle.png(), handle.info(), &texts, nullptr);
    std::string parameters;
    for (int i = 0; i < count; ++i) {
        const bool utf8 = texts[i].compression >= PNG_ITXT_COMPRESSION_NONE;
        const std::string text(texts[i].text, utf8 ? texts[i].itxt_length : texts[i].text_length);
        if (!std::strcmp(texts[i].key, "diffusionz") && is_json_object(text)) return text;
        if (!std::strcmp(texts[i].key, "parameters")) parameters = utf8 ? text : utf8_of_latin1(text);
    }
    return parameters.empty() ? "{}" : parameters_object(parameters);
}

}  // namespace diffusionz
