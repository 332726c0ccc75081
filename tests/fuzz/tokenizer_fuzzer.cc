// The tokenizer on hostile bytes. The first byte chooses: an even one reads the rest as a tokenizer.json and, when that is taken,
// encodes with it; an odd one reads the rest as a text for a small tokenizer that is known to be good.
//
// Only an Error may come out, and ids are below vocabulary_size().
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "core/error.h"
#include "core/tokenizer.h"

using diffusionz::Error;
using diffusionz::Tokenizer;

namespace {

// Every byte, a few merges, and tokens found before and after normalization.
std::string small_tokenizer() {
    std::string vocab, letter;
    int next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
        const bool visible = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
        const int point = visible ? byte : next++;
        char escaped[8];
        std::snprintf(escaped, sizeof(escaped), "\\u%04x", point);
        vocab += diffusionz::concat(byte ? "," : "", "\"", escaped, "\":", byte);
    }
    vocab += R"(,"ab":256,"abc":257,"\u0120a":258,"\u00cc\u0123":259)";
    return R"({"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":)"
           R"("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")"
           R"(},"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"use_regex":false}]},)"
           R"("model":{"type":"BPE","vocab":{)" +
           vocab +
           R"(},"merges":["a b","ab c","\u0120 a","\u00cc \u0123"]},"added_tokens":[)"
           R"({"id":260,"content":"<|im_end|>","normalized":false},{"id":261,"content":"caf\u00e9","normalized":true}]})";
}

void encode(const Tokenizer& tokenizer, std::string_view text) {
    try {
        for (const int32_t id : tokenizer.encode(text, 512))
            if (id < 0 || static_cast<size_t>(id) >= tokenizer.vocabulary_size()) std::abort();
    } catch (const Error&) {
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const Tokenizer good = Tokenizer::from_json(small_tokenizer(), "good");
    if (size == 0) return 0;
    const std::string_view rest(reinterpret_cast<const char*>(data) + 1, size - 1);
    if (data[0] % 2 == 1) {
        encode(good, rest);
        return 0;
    }
    try {
        const Tokenizer tokenizer = Tokenizer::from_json(rest, "fuzzed");
        encode(tokenizer, "It's a caf\xC3\xA9 e\xCC\x81 <|im_end|>\r\n  \xE7\x86\x8A\xE7\x8C\xAB 123 ''abc");
        encode(tokenizer, rest);
    } catch (const Error&) {
    }
    return 0;
}
