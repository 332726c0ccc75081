// The regular expression by which a tokenizer.json cuts text into words.
//
// Hugging Face's tokenizers runs it with Oniguruma, we run it with PCRE2. The two agree on what split patterns use, but
// for a few things: what `\s` holds, which Unicode version their tables are of, and syntax that means another thing in
// each. So a pattern is rewritten where the meaning differs, and refused where it holds anything that this file does not know.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

// The handles of pcre2.h, whose macros are better kept out of a header.
struct pcre2_real_code_8;
struct pcre2_real_match_context_8;

namespace diffusionz {

class SplitPattern {
public:
    // `name` is the file that messages blame. Fails with E_MODEL.
    SplitPattern(std::string_view oniguruma, const std::string& name);

    // One walk over one text. Matches and what lies between them are words alike (the "Isolated" behaviour).
    class Words {
    public:
        Words(const SplitPattern& pattern, std::string_view text);
        // Sets `word` to the next one; false at the end.
        bool next(std::string_view& word);

    private:
        const SplitPattern& pattern_;
        std::string_view text_;
        size_t offset_ = 0;       // where the next word begins
        size_t match_begin_ = 0;  // a match found behind a gap, handed out after it; empty when there is none
        size_t match_end_ = 0;
        std::shared_ptr<void> match_data_;
    };

private:
    std::string name_;
    std::shared_ptr<pcre2_real_code_8> code_;
    std::shared_ptr<pcre2_real_match_context_8> context_;
};

}  // namespace diffusionz
