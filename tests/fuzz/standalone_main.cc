// Runs a libFuzzer entry point without libFuzzer, for compilers that have none:
//
//   FUZZER SECONDS [SEED_FILE...]
//
// Tries every seed, then seeds with a few mutations each until the time is over. The same seeds give the same inputs in the same
// order. A crash leaves its input in the file `crash-input`.
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Input = std::vector<uint8_t>;

constexpr size_t kInputBytesMax = 1 << 16;
uint64_t run_count = 0;
const Input* current = nullptr;

void keep_input() {
    std::FILE* file = current ? std::fopen("crash-input", "wb") : nullptr;
    if (!file) return;
    std::fwrite(current->data(), 1, current->size(), file);
    std::fclose(file);
    current = nullptr;
}

size_t below(std::mt19937_64& random, size_t limit) { return random() % limit; }

void mutate(Input& input, const std::vector<Input>& seeds, std::mt19937_64& random) {
    if (input.empty()) input.push_back(0);
    const size_t at = below(random, input.size());
    const size_t length = 1 + below(random, std::min<size_t>(16, input.size() - at));
    const auto begin = input.begin() + static_cast<std::ptrdiff_t>(at);
    switch (below(random, 7)) {
        case 0:
            input[at] ^= static_cast<uint8_t>(1 << below(random, 8));
            break;
        case 1:
            input[at] = static_cast<uint8_t>(random());
            break;
        case 2: {  // a number at the edge of something
            static constexpr uint8_t kEdges[] = {0, 1, 0x7f, 0x80, 0xff, '"', '\\', '{', '[', ','};
            input[at] = kEdges[below(random, sizeof(kEdges))];
            break;
        }
        case 3:
            input.erase(begin, begin + static_cast<std::ptrdiff_t>(length));
            break;
        case 4: {
            const Input copy(begin, begin + static_cast<std::ptrdiff_t>(length));
            input.insert(input.begin() + static_cast<std::ptrdiff_t>(below(random, input.size())), copy.begin(), copy.end());
            break;
        }
        case 5:
            input.resize(at);
            break;
        case 6: {  // a piece of another seed
            const Input& other = seeds[below(random, seeds.size())];
            if (other.empty()) break;
            const size_t from = below(random, other.size());
            const size_t count = 1 + below(random, std::min<size_t>(64, other.size() - from));
            const auto piece = other.begin() + static_cast<std::ptrdiff_t>(from);
            input.insert(begin, piece, piece + static_cast<std::ptrdiff_t>(count));
            break;
        }
    }
    if (input.size() > kInputBytesMax) input.resize(kInputBytesMax);
}

void run(const Input& input) {
    ++run_count;
    // A copy of the exact size, so that a sanitizer sees a read past its end.
    const Input exact(input);
    current = &exact;
    LLVMFuzzerTestOneInput(exact.data(), exact.size());
    current = nullptr;
}

}  // namespace

// A sanitizer ends the process without a signal, and calls this first; there is none without a sanitizer.
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

int main(int argc, char** argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: %s SECONDS [SEED_FILE...]\n", argv[0]);
        return 2;
    }
    std::signal(SIGABRT, [](int) { keep_input(); });
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(keep_input);
    std::vector<Input> seeds = {{}};
    for (int i = 2; i < argc; ++i) {
        std::ifstream file(argv[i], std::ios::binary);
        if (!file) {
            std::fprintf(stderr, "cannot read %s\n", argv[i]);
            return 1;
        }
        seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
    for (const Input& seed : seeds) run(seed);

    std::mt19937_64 random(1);
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(argv[1]));
    while (std::chrono::steady_clock::now() < end) {
        Input input = seeds[below(random, seeds.size())];
        for (size_t count = 1 + below(random, 8); count > 0; --count) mutate(input, seeds, random);
        run(input);
    }
    std::printf("%llu inputs, no crash\n", static_cast<unsigned long long>(run_count));
}
