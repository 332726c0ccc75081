#include "core/split_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>

#include "core/error.h"

namespace diffusionz {
namespace {

// Oniguruma's \s, which is Unicode's White_Space. PCRE2's also has U+180E, a space until Unicode 6.3.
constexpr std::string_view kSpace =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

// Letters and numbers of Unicode 15 to 16, which Oniguruma 6.9.10 knows and PCRE2 10.42 (Unicode 14) does not.
// A newer PCRE2 knows them too, and then they are named twice.
constexpr std::string_view kNewLetters =
    R"(\x{1c89}-\x{1c8a}\x{a7cb}-\x{a7cd}\x{a7da}-\x{a7dc}\x{105c0}-\x{105f3}\x{10d4a}-\x{10d65}\x{10d6f}-\x{10d85})"
    R"(\x{10ec2}-\x{10ec4}\x{1123f}-\x{11240}\x{11380}-\x{11389}\x{1138b}\x{1138e}\x{11390}-\x{113b5}\x{113b7}\x{113d1})"
    R"(\x{113d3}\x{11bc0}-\x{11be0}\x{11f02}\x{11f04}-\x{11f10}\x{11f12}-\x{11f33}\x{1342f}\x{13441}-\x{13446})"
    R"(\x{13460}-\x{143fa}\x{16100}-\x{1611d}\x{16d40}-\x{16d6c}\x{18cff}\x{1b132}\x{1b155}\x{1df25}-\x{1df2a})"
    R"(\x{1e030}-\x{1e06d}\x{1e4d0}-\x{1e4eb}\x{1e5d0}-\x{1e5ed}\x{1e5f0}\x{2b739}\x{2ebf0}-\x{2ee5d}\x{31350}-\x{323af})";
constexpr std::string_view kNewNumbers =
    R"(\x{10d40}-\x{10d49}\x{116d0}-\x{116e3}\x{11bf0}-\x{11bf9}\x{11f50}-\x{11f59}\x{16130}-\x{16139}\x{16d70}-\x{16d79})"
    R"(\x{1ccf0}-\x{1ccf9}\x{1d2c0}-\x{1d2d3}\x{1e4f0}-\x{1e4f9}\x{1e5f1}-\x{1e5fa})";

constexpr size_t kPatternLengthMax = 4096;

bool is_ascii_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_ascii_punctuation(char c) { return c > ' ' && c < 0x7f && !is_ascii_letter(c) && !is_digit(c); }

// Rewrites a pattern from Oniguruma's syntax into PCRE2's.
class Translator {
public:
    Translator(std::string_view source, const std::string& name) : source_(source), name_(name) {}

    std::string run() {
        while (at_ < source_.size()) {
            const char c = source_[at_];
            if (c == '\\') {
                escape();
            } else if (c == '[') {
                character_class();
            } else if (c == '(') {
                group();
            } else if (c == '{') {
                repetition();
            } else if (c == '.' || c == '^' || c == '$') {
                refuse(1);  // what a newline is to them differs
            } else {
                copy(1);
            }
        }
        return std::move(out_);
    }

private:
    [[noreturn]] void refuse(size_t length) const {
        // Whole characters, for a message that is UTF-8.
        while (at_ + length < source_.size() && (source_[at_ + length] & 0xC0) == 0x80) ++length;
        fail(DIFFUSIONZ_E_MODEL, name_, ": the split pattern uses '", source_.substr(at_, length), "' at byte ", at_,
             ", which is not supported: ", source_);
    }

    void copy(size_t length) {
        out_ += source_.substr(at_, length);
        at_ += length;
    }

    bool follows(std::string_view text) const { return source_.substr(at_).starts_with(text); }

    // At a backslash: the inside of a class for \s, \S, \p{..} and \P{..}, "" for an escape of one character, which is copied.
    std::string set(bool& negated) {
        const char c = at_ + 1 < source_.size() ? source_[at_ + 1] : '\0';
        negated = c == 'S' || c == 'P';
        if (c == 's' || c == 'S') {
            at_ += 2;
            return std::string(kSpace);
        }
        if (c == 'p' || c == 'P') {
            // General categories only: a script's name means the Script in one library and Script_Extensions in the other.
            static constexpr std::string_view kGroups = "LMNPSZC";
            static constexpr std::string_view kCategories =
                "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf ";
            const size_t close = source_.find('}', at_);
            if (at_ + 2 >= source_.size() || source_[at_ + 2] != '{' || close == source_.npos) refuse(2);
            const auto category = source_.substr(at_ + 3, close - at_ - 3);
            const bool known = (category.size() == 1 && kGroups.find(category[0]) != kGroups.npos) ||
                               (category.size() == 2 && kCategories.find(std::string(category) + " ") != kCategories.npos);
            if (!known) refuse(close + 1 - at_);
            at_ = close + 1;
            // The property first: it is what most characters match.
            return concat("\\p{", category, "}", category == "L" ? kNewLetters : category == "N" ? kNewNumbers : "");
        }
        if (c != 'r' && c != 'n' && c != 't' && !is_ascii_punctuation(c)) refuse(2);
        copy(2);
        return "";
    }

    void escape() {
        bool negated;
        const std::string inside = set(negated);
        if (!inside.empty()) out_ += concat(negated ? "[^" : "[", inside, "]");
    }

    void character_class() {
        copy(follows("[^") ? 2 : 1);
        if (follows("]")) refuse(1);
        while (!follows("]")) {
            if (at_ == source_.size()) fail(DIFFUSIONZ_E_MODEL, name_, ": the split pattern has a '[' without ']': ", source_);
            if (follows("[") || follows("&&")) refuse(2);  // sets within sets
            if (!follows("\\")) {
                copy(1);
                continue;
            }
            bool negated;
            const size_t begin = at_;
            const std::string inside = set(negated);
            if (inside.empty()) continue;
            const bool range = follows("-") && !source_.substr(at_ + 1).starts_with("]");
            if (negated || range || out_.ends_with('-')) {
                at_ = begin;
                refuse(2);
            }
            out_ += inside;
        }
        copy(1);
    }

    void group() {
        if (follows("(?i:")) {
            // Oniguruma also folds one character to several (ss and U+00DF), PCRE2 does not: literals that have no such folding.
            const size_t close = source_.find(')', at_);
            if (close == source_.npos) refuse(4);
            std::string literals(source_.substr(at_ + 4, close - at_ - 4));
            for (char& c : literals) {
                if (!is_ascii_letter(c) && c != '\'' && c != '|') refuse(close + 1 - at_);
                if (is_ascii_letter(c)) c |= 0x20;
            }
            for (std::string_view folded : {"ss", "st", "ff", "fi", "fl"})
                if (literals.find(folded) != literals.npos) refuse(close + 1 - at_);
            copy(close + 1 - at_);
        } else if (follows("(?:") || follows("(?=") || follows("(?!") || follows("(?>")) {
            copy(3);
        } else if (follows("(?") || follows("(*")) {
            refuse(3);
        } else {
            copy(1);
        }
    }

    // {n}, {n,} or {n,m}, of at most three digits each.
    void repetition() {
        size_t end = at_ + 1;
        auto digits = [&] {
            size_t count = 0;
            while (end < source_.size() && is_digit(source_[end])) ++end, ++count;
            return count;
        };
        const size_t first = digits();
        size_t second = 0;
        if (end < source_.size() && source_[end] == ',') ++end, second = digits();
        const bool closed = end < source_.size() && source_[end] == '}';
        if (!closed || first == 0 || first > 3 || second > 3) refuse(1);
        copy(end + 1 - at_);
        if (follows("?") || follows("+")) refuse(1);  // lazy or possessive in one library, a second repetition in the other
    }

    std::string_view source_;
    const std::string& name_;
    size_t at_ = 0;
    std::string out_;
};

std::string pcre2_message(int code) {
    PCRE2_UCHAR buffer[256];
    pcre2_get_error_message(code, buffer, sizeof(buffer));
    return reinterpret_cast<const char*>(buffer);
}

}  // namespace

SplitPattern::SplitPattern(std::string_view oniguruma, const std::string& name) : name_(name) {
    if (oniguruma.size() > kPatternLengthMax)
        fail(DIFFUSIONZ_E_MODEL, name, ": the split pattern has ", oniguruma.size(), " bytes; at most ", kPatternLengthMax,
             " are allowed");
    const std::string source = Translator(oniguruma, name).run();
    int error = 0;
    PCRE2_SIZE error_offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(source.data()), source.size(), PCRE2_UTF | PCRE2_UCP, &error,
                              &error_offset, nullptr),
                pcre2_code_free);
    if (!code_) fail(DIFFUSIONZ_E_MODEL, name, ": the split pattern is not valid (", pcre2_message(error), "): ", oniguruma);
    uint32_t matches_empty = 0;
    pcre2_pattern_info(code_.get(), PCRE2_INFO_MATCHEMPTY, &matches_empty);
    if (matches_empty) fail(DIFFUSIONZ_E_MODEL, name, ": the split pattern can match an empty string: ", oniguruma);
    // Only for speed: where the JIT is not allowed or cannot do it, PCRE2 interprets.
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);

    context_.reset(pcre2_match_context_create(nullptr), pcre2_match_context_free);
    if (!context_) throw std::bad_alloc();
    // Backtracking of a hostile pattern ends in an error, not in minutes or gigabytes.
    pcre2_set_match_limit(context_.get(), 10'000'000);
    pcre2_set_heap_limit(context_.get(), 64 * 1024);  // KiB
}

SplitPattern::Words::Words(const SplitPattern& pattern, std::string_view text)
    : pattern_(pattern), text_(text), match_data_(pcre2_match_data_create(1, nullptr), [](void* data) {
          pcre2_match_data_free(static_cast<pcre2_match_data*>(data));
      }) {
    if (!match_data_) throw std::bad_alloc();
}

bool SplitPattern::Words::next(std::string_view& word) {
    if (offset_ == text_.size()) return false;
    if (match_begin_ == match_end_) {
        auto* data = static_cast<pcre2_match_data*>(match_data_.get());
        // The text is known to be UTF-8. Without this flag PCRE2 would read the rest of it again for each word.
        uint32_t options = PCRE2_NO_UTF_CHECK;
        auto match = [&] {
            return pcre2_match(pattern_.code_.get(), reinterpret_cast<PCRE2_SPTR>(text_.data()), text_.size(), offset_, options,
                               data, pattern_.context_.get());
        };
        int count = match();
        if (count == PCRE2_ERROR_JIT_STACKLIMIT) {
            options |= PCRE2_NO_JIT;  // the interpreter backtracks on the heap
            count = match();
        }
        if (count == PCRE2_ERROR_NOMEMORY) throw std::bad_alloc();
        if (count < 0 && count != PCRE2_ERROR_NOMATCH)
            fail(DIFFUSIONZ_E_MODEL, pattern_.name_, ": the split pattern failed at byte ", offset_, " of a text (",
                 pcre2_message(count), ")");
        match_begin_ = match_end_ = text_.size();
        if (count >= 0) {
            const PCRE2_SIZE* span = pcre2_get_ovector_pointer(data);
            match_begin_ = span[0];
            match_end_ = span[1];
        }
    }
    const size_t end = offset_ < match_begin_ ? match_begin_ : match_end_;
    word = text_.substr(offset_, end - offset_);
    offset_ = end;
    if (end == match_end_) match_begin_ = match_end_;
    return true;
}

}  // namespace diffusionz
