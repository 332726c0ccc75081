#include "core/tokenizer.h"

#include <algorithm>
#include <bit>
#include <fstream>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <queue>

#include "core/error.h"
#include "core/unicode.h"

namespace diffusionz {
namespace {

using nlohmann::json;

// The letter that stands for a byte in a byte-level vocabulary, as UTF-8: the byte's own character where that is visible,
// else one from U+0100 on, in order. GPT-2 began this so that a vocabulary is readable text without spaces.
std::array<std::string, 256> byte_letters() {
    std::array<std::string, 256> letters;
    int next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
        const bool visible = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
        const int point = visible ? byte : next++;
        if (point < 0x80)
            letters[byte] = {static_cast<char>(point)};
        else
            letters[byte] = {static_cast<char>(0xC0 | point >> 6), static_cast<char>(0x80 | (point & 0x3F))};
    }
    return letters;
}

// Reads a tokenizer.json in one pass: model.vocab and model.merges, nearly all of its 11 MB, straight into tables; the rest,
// which is small, into a document. A document of everything takes three times as long.
class Reader : public nlohmann::json_sax<json> {
public:
    explicit Reader(const std::string& name) : name_(name) {}

    json document;
    Vocabulary vocabulary;
    int32_t id_max = 0;
    std::vector<std::array<std::string, 2>> merges;

    bool null() override { return scalar(nullptr); }
    bool boolean(bool value) override { return scalar(value); }
    bool number_integer(number_integer_t value) override { return scalar(value); }
    bool number_float(number_float_t value, const string_t&) override { return scalar(value); }
    bool binary(binary_t&) override { return false; }  // JSON text has none

    bool number_unsigned(number_unsigned_t value) override {
        if (part_ != Part::kVocabulary) return scalar(value);
        if (value > kIdMax)
            fail(DIFFUSIONZ_E_MODEL, name_, ": token '", key_, "' has id ", value, "; at most ", kIdMax, " is allowed");
        if (!vocabulary.add(key_, static_cast<int32_t>(value)))
            fail(DIFFUSIONZ_E_MODEL, name_, ": token '", key_, "' is twice in model.vocab");
        id_max = std::max(id_max, static_cast<int32_t>(value));
        return true;
    }

    bool string(string_t& value) override {
        if (part_ != Part::kMerges) return scalar(std::move(value));
        if (pair_size_ >= 0) {  // ["a", "b"]
            if (pair_size_ == 2) bad_merge();
            merges.back()[pair_size_++] = std::move(value);
        } else {  // "a b", the older form
            const size_t space = value.find(' ');
            if (space == value.npos || value.find(' ', space + 1) != value.npos) bad_merge();
            merges.push_back({value.substr(0, space), value.substr(space + 1)});
        }
        return true;
    }

    bool key(string_t& value) override {
        key_ = std::move(value);
        return true;
    }

    bool start_object(std::size_t) override {
        if (part_ == Part::kDocument && in_model() && key_ == "vocab") return begin(Part::kVocabulary, vocabulary.size() == 0);
        if (part_ != Part::kDocument) bad_part();
        open(json::object());
        return true;
    }
    bool end_object() override {
        if (part_ == Part::kVocabulary)
            part_ = Part::kDocument;
        else
            close();
        return true;
    }

    bool start_array(std::size_t) override {
        if (part_ == Part::kDocument && in_model() && key_ == "merges") return begin(Part::kMerges, merges.empty());
        if (part_ == Part::kVocabulary || pair_size_ >= 0) bad_part();
        if (part_ == Part::kMerges) {
            merges.emplace_back();
            pair_size_ = 0;
        } else {
            open(json::array());
        }
        return true;
    }
    bool end_array() override {
        if (part_ != Part::kMerges) {
            close();
        } else if (pair_size_ >= 0) {
            if (pair_size_ != 2) bad_merge();
            pair_size_ = -1;
        } else {
            part_ = Part::kDocument;
        }
        return true;
    }

    bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
        fail(DIFFUSIONZ_E_MODEL, name_, ": not valid JSON at byte ", position);
    }

private:
    enum class Part { kDocument, kVocabulary, kMerges };
    static constexpr int32_t kIdMax = (1 << 24) - 1;

    bool in_model() const { return open_.size() == 2 && open_[1] == model_; }

    bool begin(Part part, bool first) {
        if (!first) fail(DIFFUSIONZ_E_MODEL, name_, ": model.", key_, " is there twice");
        part_ = part;
        return true;
    }

    // Adds a value to the document and returns where it lies.
    json* add(json value) {
        if (open_.empty()) return &(document = std::move(value));
        if (open_.back()->is_array()) return &open_.back()->emplace_back(std::move(value));
        return &((*open_.back())[key_] = std::move(value));
    }

    template <class Value>
    bool scalar(Value&& value) {
        if (part_ != Part::kDocument) bad_part();
        add(std::forward<Value>(value));
        return true;
    }

    void open(json value) {
        const bool model = open_.size() == 1 && open_[0]->is_object() && key_ == "model";
        open_.push_back(add(std::move(value)));
        if (model) model_ = open_.back();
    }
    void close() { open_.pop_back(); }

    [[noreturn]] void bad_part() const {
        if (part_ == Part::kMerges) bad_merge();
        fail(DIFFUSIONZ_E_MODEL, name_, ": model.vocab must map each token to its id, a whole number from 0 on; '", key_,
             "' has something else");
    }
    [[noreturn]] void bad_merge() const {
        fail(DIFFUSIONZ_E_MODEL, name_, ": entry ", merges.size() - (pair_size_ >= 0),
             " of model.merges is neither \"a b\" nor [\"a\", \"b\"]");
    }

    const std::string& name_;
    Part part_ = Part::kDocument;
    std::string key_;          // the last key read
    std::vector<json*> open_;  // objects and arrays that are not closed yet, the outermost first
    const json* model_ = nullptr;
    int pair_size_ = -1;  // strings read of a merge written as an array; -1 outside of one
};

// The settings of one JSON object, each of which must be asked for: what is left over is refused.
class Settings {
public:
    // `where` is what messages call it, "model" or "pre_tokenizer".
    Settings(const json& object, std::string where, const std::string& name)
        : object_(object), where_(std::move(where)), name_(name) {
        if (!object.is_object()) fail(DIFFUSIONZ_E_MODEL, name, ": ", where_, " is not a JSON object");
    }

    // null where it is absent.
    const json& get(const std::string& key) {
        known_.push_back(key);
        static const json absent;
        const auto found = object_.find(key);
        return found == object_.end() ? absent : *found;
    }

    std::string text(const std::string& key) {
        const json& value = get(key);
        if (!value.is_string()) refuse(key, value);
        return value.get<std::string>();
    }

    bool flag(const std::string& key, bool otherwise) {
        const json& value = get(key);
        if (value.is_null()) return otherwise;
        if (!value.is_boolean()) refuse(key, value);
        return value.get<bool>();
    }

    const std::vector<json>& list(const std::string& key) {
        const json& value = get(key);
        if (!value.is_array()) refuse(key, value);
        return value.get_ref<const json::array_t&>();
    }

    // The setting must be absent, null, or one of these.
    void only(const std::string& key, std::initializer_list<json> allowed) {
        const json& value = get(key);
        if (!value.is_null() && std::find(allowed.begin(), allowed.end(), value) == allowed.end()) refuse(key, value);
    }

    void no_others() const {
        for (const auto& [key, value] : object_.items())
            if (std::find(known_.begin(), known_.end(), key) == known_.end()) refuse(key, value);
    }

    [[noreturn]] void refuse(const std::string& key, const json& value) const {
        // A long value says no more than its beginning does.
        std::string shown = value.is_structured() ? value.type_name() : value.dump();
        if (shown.size() > 80) shown = concat("a ", value.type_name(), " of ", shown.size(), " bytes");
        fail(DIFFUSIONZ_E_MODEL, name_, ": ", where_, ".", key, " is ", shown, ", which is not supported");
    }

private:
    const json& object_;
    std::string where_;
    const std::string& name_;
    std::vector<std::string> known_;
};

// Calls `one` for `value`, or for each member when it is a Sequence, whose list is called `members`.
template <class One>
void each(const json& value, const std::string& members, const std::string& where, const std::string& name, One&& one) {
    Settings settings(value, where, name);
    if (settings.get("type") != "Sequence") return one(value);
    for (const json& member : settings.list(members)) one(member);
    settings.no_others();
}

bool wants_nfc(const json& normalizer, const std::string& name) {
    bool nfc = false;
    if (normalizer.is_null()) return nfc;
    each(normalizer, "normalizers", "normalizer", name, [&](const json& one) {
        Settings settings(one, "normalizer", name);
        if (settings.text("type") != "NFC") settings.refuse("type", one["type"]);
        settings.no_others();
        nfc = true;
    });
    return nfc;
}

// The pre-tokenizer is one split and the mapping of bytes to letters: Split and ByteLevel, or ByteLevel with its own pattern.
std::string split_pattern(const json& pre_tokenizer, const std::string& name) {
    static constexpr std::string_view kGpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
    std::string pattern;
    bool byte_level = false;
    each(pre_tokenizer, "pretokenizers", "pre_tokenizer", name, [&](const json& one) {
        Settings settings(one, "pre_tokenizer", name);
        const std::string type = settings.text("type");
        bool splits = true;
        if (byte_level) fail(DIFFUSIONZ_E_MODEL, name, ": pre_tokenizer.", type, " after ByteLevel is not supported");
        if (type == "Split") {
            settings.only("behavior", {"Isolated"});
            settings.only("invert", {false});
            Settings nested(settings.get("pattern"), "pre_tokenizer.pattern", name);
            if (!pattern.empty()) fail(DIFFUSIONZ_E_MODEL, name, ": more than one split in pre_tokenizer is not supported");
            pattern = nested.text("Regex");
            nested.no_others();
        } else if (type == "ByteLevel") {
            byte_level = true;
            settings.get("trim_offsets");  // says where tokens lie in the text, which nobody asks here
            // The one value that tokenizers takes an absent setting for is true, for both.
            if (settings.flag("add_prefix_space", true)) settings.refuse("add_prefix_space", true);
            splits = settings.flag("use_regex", true);
            if (splits && !pattern.empty())
                fail(DIFFUSIONZ_E_MODEL, name, ": more than one split in pre_tokenizer is not supported");
            if (splits) pattern = kGpt2;
        } else {
            settings.refuse("type", type);
        }
        settings.no_others();
    });
    if (!byte_level || pattern.empty())
        fail(DIFFUSIONZ_E_MODEL, name, ": pre_tokenizer must split by a pattern and be ByteLevel");
    return pattern;
}

void check_post_processor(const json& post_processor, const std::string& name) {
    if (post_processor.is_null()) return;
    each(post_processor, "processors", "post_processor", name, [&](const json& one) {
        // ByteLevel moves offsets only. The others add tokens.
        Settings settings(one, "post_processor", name);
        if (settings.text("type") != "ByteLevel") settings.refuse("type", one["type"]);
    });
}

uint64_t pair_key(int32_t left, int32_t right) { return static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right); }

// Fibonacci hashing: the product's upper half is well mixed.
size_t pair_hash(uint64_t pair) { return (pair * 0x9E3779B97F4A7C15u) >> 32; }

}  // namespace

void Tokenizer::AddedTokens::add(std::string content, int32_t id) {
    auto& tokens = by_first_byte[static_cast<unsigned char>(content[0])];
    tokens.push_back({std::move(content), id});
    std::stable_sort(tokens.begin(), tokens.end(),
                     [](const Token& a, const Token& b) { return a.content.size() > b.content.size(); });
    empty = false;
}

const Tokenizer::AddedTokens::Token* Tokenizer::AddedTokens::find(std::string_view text, size_t offset, size_t& begin) const {
    if (empty) return nullptr;
    for (begin = offset; begin < text.size(); ++begin)
        for (const Token& token : by_first_byte[static_cast<unsigned char>(text[begin])])
            if (text.substr(begin).starts_with(token.content)) return &token;
    return nullptr;
}

Tokenizer Tokenizer::from_file(const std::filesystem::path& tokenizer_json) {
    std::error_code error;
    const auto size = std::filesystem::file_size(tokenizer_json, error);
    if (error) fail(DIFFUSIONZ_E_MODEL, tokenizer_json.string(), ": ", error.message());
    std::string text(size, '\0');
    std::ifstream file(tokenizer_json, std::ios::binary);
    if (!file.read(text.data(), static_cast<std::streamsize>(size)))
        fail(DIFFUSIONZ_E_MODEL, tokenizer_json.string(), ": cannot be read");
    return from_json(text, tokenizer_json.string());
}

Tokenizer Tokenizer::from_json(std::string_view text, const std::string& name) {
    Reader reader(name);
    json::sax_parse(text, &reader);

    Settings root(reader.document, "tokenizer", name);
    // The caller cuts and pads, and nothing here decodes.
    for (const char* key : {"version", "truncation", "padding", "decoder"}) root.get(key);
    check_post_processor(root.get("post_processor"), name);
    Tokenizer result(SplitPattern(split_pattern(root.get("pre_tokenizer"), name), name));
    result.normalize_nfc_ = wants_nfc(root.get("normalizer"), name);

    Settings model(root.get("model"), "model", name);
    model.only("type", {"BPE"});
    model.only("dropout", {0, 0.0});
    model.only("continuing_subword_prefix", {""});
    model.only("end_of_word_suffix", {""});
    model.only("byte_fallback", {false});
    const bool ignore_merges = model.flag("ignore_merges", false);
    // Every byte has a token, as is checked below: nothing is ever unknown.
    model.get("unk_token");
    model.get("fuse_unk");
    model.no_others();

    const auto letters = byte_letters();
    for (int byte = 0; byte < 256; ++byte) {
        result.byte_ids_[byte] = reader.vocabulary.find(letters[byte]);
        if (result.byte_ids_[byte] < 0)
            fail(DIFFUSIONZ_E_MODEL, name, ": model.vocab has no token '", letters[byte], "' for byte ", byte,
                 "; it is not a byte-level vocabulary");
    }
    result.vocabulary_size_ = static_cast<size_t>(reader.id_max) + 1;

    std::vector<Merge> merges(reader.merges.size());
    for (size_t rank = 0; rank < merges.size(); ++rank) {
        const auto& [left, right] = reader.merges[rank];
        auto id_of = [&](const std::string& token) {
            const int32_t id = reader.vocabulary.find(token);
            if (id < 0)
                fail(DIFFUSIONZ_E_MODEL, name, ": entry ", rank, " of model.merges needs token '", token,
                     "', which model.vocab has not");
            return id;
        };
        merges[rank] = {pair_key(id_of(left), id_of(right)), static_cast<int32_t>(rank), id_of(left + right)};
    }
    result.add_merges(merges);

    const json& added = root.get("added_tokens");
    if (!added.is_null() && !added.is_array()) root.refuse("added_tokens", added);
    for (const json& one : added) {
        Settings token(one, "added_tokens", name);
        const std::string content = token.text("content");
        const json& id = token.get("id");
        if (content.empty() || !id.is_number_unsigned() || id > (1 << 24) - 1) token.refuse("id", id);
        token.only("single_word", {false});
        token.only("lstrip", {false});
        token.only("rstrip", {false});
        token.get("special");  // a decoder skips special tokens; an encoder finds them like the others
        const bool normalized = token.flag("normalized", false);
        token.no_others();
        const int32_t in_model = reader.vocabulary.find(content);
        if (in_model >= 0 && in_model != id)
            fail(DIFFUSIONZ_E_MODEL, name, ": token '", content, "' has id ", in_model, " in model.vocab and ", id.dump(),
                 " in added_tokens");
        if (normalized)
            result.added_normalized_.add(result.normalize_nfc_ ? nfc(content) : content, id);
        else
            result.added_raw_.add(content, id);
        result.vocabulary_size_ = std::max(result.vocabulary_size_, id.get<size_t>() + 1);
    }
    root.no_others();
    if (ignore_merges) result.words_ = std::move(reader.vocabulary);
    return result;
}

void Tokenizer::add_merges(const std::vector<Merge>& merges) {
    merges_.resize(std::bit_ceil(2 * merges.size() + 1));
    const size_t mask = merges_.size() - 1;
    for (const Merge& merge : merges) {
        size_t slot = pair_hash(merge.pair) & mask;
        while (merges_[slot].pair != kNoPair && merges_[slot].pair != merge.pair) slot = (slot + 1) & mask;
        merges_[slot] = merge;  // of one pair written twice the last counts, as in tokenizers
    }
}

Tokenizer::Merge Tokenizer::find_merge(int32_t left, int32_t right) const {
    const uint64_t pair = pair_key(left, right);
    const size_t mask = merges_.size() - 1;
    size_t slot = pair_hash(pair) & mask;
    while (merges_[slot].pair != kNoPair && merges_[slot].pair != pair) slot = (slot + 1) & mask;
    return merges_[slot];
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, size_t max_tokens) const {
    check_utf8(text);
    // Positions in a word are 32 bits wide.
    if (text.size() > std::numeric_limits<int32_t>::max())
        fail(DIFFUSIONZ_E_ARGUMENT, "the text has ", text.size(), " bytes; at most 2147483647 are allowed");

    std::vector<int32_t> ids;
    // Cuts `part` at its added tokens and hands what lies between them to `between`.
    auto split = [&](const AddedTokens& added, std::string_view part, auto&& between) {
        for (size_t offset = 0; offset < part.size() && ids.size() < max_tokens;) {
            size_t begin = 0;
            const AddedTokens::Token* token = added.find(part, offset, begin);
            if (!token) begin = part.size();
            if (offset < begin) between(part.substr(offset, begin - offset));
            if (token) ids.push_back(token->id);
            offset = token ? begin + token->content.size() : begin;
        }
    };
    split(added_raw_, text, [&](std::string_view part) {
        const std::string normalized = normalize_nfc_ ? nfc(part) : std::string(part);
        split(added_normalized_, normalized, [&](std::string_view plain) { encode_plain(plain, max_tokens, ids); });
    });
    if (ids.size() > max_tokens) ids.resize(max_tokens);
    return ids;
}

void Tokenizer::encode_plain(std::string_view text, size_t max_tokens, std::vector<int32_t>& ids) const {
    SplitPattern::Words words(pattern_, text);
    std::string_view word;
    while (ids.size() < max_tokens && words.next(word)) {
        if (words_.size() > 0) {
            static const auto letters = byte_letters();
            std::string spelled;
            for (unsigned char byte : word) spelled += letters[byte];
            if (const int32_t id = words_.find(spelled); id >= 0) {
                ids.push_back(id);
                continue;
            }
        }
        encode_word(word, ids);
    }
}

// Merges the pair of the lowest rank, the leftmost of equals, until no pair merges. The queue makes a word of n bytes cost
// n log n; a pair in it that has since changed is known by its rank, which no other pair has.
void Tokenizer::encode_word(std::string_view word, std::vector<int32_t>& ids) const {
    struct Symbol {
        int32_t id;
        int32_t previous;
        int32_t next;
        bool alive;
    };
    const auto length = static_cast<int32_t>(word.size());
    std::vector<Symbol> symbols(length);
    for (int32_t i = 0; i < length; ++i)
        symbols[i] = {byte_ids_[static_cast<unsigned char>(word[i])], i - 1, i + 1 < length ? i + 1 : -1, true};

    auto merge_at = [&](int32_t left) {
        const int32_t right = left < 0 ? -1 : symbols[left].next;
        return right < 0 ? Merge{} : find_merge(symbols[left].id, symbols[right].id);
    };
    std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> queue;  // rank << 32 | position
    auto push = [&](int32_t left) {
        if (const Merge merge = merge_at(left); merge.rank >= 0) queue.push(pair_key(merge.rank, left));
    };
    for (int32_t i = 0; i + 1 < length; ++i) push(i);

    while (!queue.empty()) {
        const auto rank = static_cast<int32_t>(queue.top() >> 32);
        const auto left = static_cast<int32_t>(queue.top() & 0xFFFFFFFF);
        queue.pop();
        const Merge merge = symbols[left].alive ? merge_at(left) : Merge{};
        if (merge.rank != rank) continue;
        const int32_t right = symbols[left].next;
        symbols[right].alive = false;
        symbols[left].id = merge.id;
        symbols[left].next = symbols[right].next;
        if (symbols[left].next >= 0) symbols[symbols[left].next].previous = left;
        push(symbols[left].previous);
        push(left);
    }
    for (int32_t i = 0; i >= 0; i = symbols[i].next) ids.push_back(symbols[i].id);
}

std::string chat_form(std::string_view prompt) {
    return concat("<|im_start|>user\n", prompt, "<|im_end|>\n<|im_start|>assistant\n");
}

}  // namespace diffusionz
