// Byte-level BPE from a checkpoint's own tokenizer.json (Hugging Face tokenizers' format, as Qwen2 and Qwen3 use it).
//
// Ids equal those of Hugging Face's tokenizers. Whatever a tokenizer.json asks for that this class does not do is refused
// with E_MODEL, never skipped. Known differences: tokenizers normalizes by Unicode 9, utf8proc by Unicode 15 or newer,
// so two neighbouring marks of which one was assigned since then can come in another order; and it loses the old Korean vowel
// U+11A7 behind a syllable without a final consonant, which is kept here.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "core/split_pattern.h"
#include "core/vocabulary.h"

namespace diffusionz {

class Tokenizer {
public:
    static Tokenizer from_file(const std::filesystem::path& tokenizer_json);
    // `name` is what messages call the text.
    static Tokenizer from_json(std::string_view text, const std::string& name);

    // Ids of UTF-8 `text`, special tokens in it recognised, cut to the first `max_tokens`. Fails with E_ARGUMENT where the text
    // is not UTF-8. Any thread, any number at once.
    std::vector<int32_t> encode(std::string_view text, size_t max_tokens) const;

    // One more than the largest id: the rows that an embedding needs.
    size_t vocabulary_size() const { return vocabulary_size_; }

private:
    struct Merge {
        uint64_t pair = kNoPair;  // left id << 32 | right id
        int32_t rank = -1;        // the smaller goes first; -1 is "they do not merge"
        int32_t id = 0;           // of the merged token
    };
    static constexpr uint64_t kNoPair = ~uint64_t{0};

    // Tokens that are found in the text as they stand, before it is split into words.
    struct AddedTokens {
        struct Token {
            std::string content;
            int32_t id;
        };
        void add(std::string content, int32_t id);
        // The longest of the tokens that begin at the first place where any does; nullptr when none is left. Sets `begin`.
        const Token* find(std::string_view text, size_t offset, size_t& begin) const;

        std::array<std::vector<Token>, 256> by_first_byte;  // the longest first
        bool empty = true;
    };

    explicit Tokenizer(SplitPattern pattern) : pattern_(std::move(pattern)) {}
    void add_merges(const std::vector<Merge>& merges);
    Merge find_merge(int32_t left, int32_t right) const;
    void encode_plain(std::string_view text, size_t max_tokens, std::vector<int32_t>& ids) const;
    void encode_word(std::string_view word, std::vector<int32_t>& ids) const;

    SplitPattern pattern_;
    bool normalize_nfc_ = false;
    std::array<int32_t, 256> byte_ids_{};
    std::vector<Merge> merges_;  // open addressing, a power of two
    // Whole words, for a model that prefers them to merges (ignore_merges); else empty. Keys are in byte-level letters.
    Vocabulary words_;
    AddedTokens added_raw_;         // found in the text as given
    AddedTokens added_normalized_;  // found after normalization ("normalized": true)
    size_t vocabulary_size_ = 0;
};

// Z-Image's fixed chat form: Qwen3's template with one user turn and the generation prompt.
std::string chat_form(std::string_view prompt);

}  // namespace diffusionz
