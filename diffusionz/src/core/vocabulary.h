// Tokens to ids: a hash table made for loading 150,000 of them fast.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace diffusionz {

// Open addressing, with all letters in one string: std::unordered_map spends half of a tokenizer's load on misses of the cache.
class Vocabulary {
public:
    // False, and nothing is changed, when the token is there already. `id` >= 0.
    bool add(std::string_view token, int32_t id) {
        if (2 * (size_ + 1) > slots_.size()) grow();
        const auto hash = static_cast<uint32_t>(std::hash<std::string_view>()(token));
        Slot& slot = slots_[place(token, hash)];
        if (slot.id >= 0) return false;
        slot = {hash, static_cast<uint32_t>(token.size()), letters_.size(), id};
        letters_ += token;
        ++size_;
        return true;
    }

    // -1 when the token is not there.
    int32_t find(std::string_view token) const {
        if (slots_.empty()) return -1;
        return slots_[place(token, static_cast<uint32_t>(std::hash<std::string_view>()(token)))].id;
    }

    size_t size() const { return size_; }

private:
    struct Slot {
        uint32_t hash = 0;
        uint32_t length = 0;
        size_t begin = 0;  // in letters_
        int32_t id = -1;   // -1 is a free slot
    };

    // Where the token lies, or the free slot where it belongs.
    size_t place(std::string_view token, uint32_t hash) const {
        const size_t mask = slots_.size() - 1;
        size_t at = hash & mask;
        while (slots_[at].id >= 0 &&
               (slots_[at].hash != hash || std::string_view(letters_).substr(slots_[at].begin, slots_[at].length) != token))
            at = (at + 1) & mask;
        return at;
    }

    void grow() {
        std::vector<Slot> old(slots_.empty() ? 1024 : 2 * slots_.size());
        old.swap(slots_);
        const size_t mask = slots_.size() - 1;
        for (const Slot& slot : old) {
            if (slot.id < 0) continue;
            size_t at = slot.hash & mask;
            while (slots_[at].id >= 0) at = (at + 1) & mask;
            slots_[at] = slot;
        }
    }

    std::string letters_;
    std::vector<Slot> slots_;  // a power of two
    size_t size_ = 0;
};

}  // namespace diffusionz
