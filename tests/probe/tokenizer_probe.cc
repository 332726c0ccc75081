// tokenizer_probe TOKENIZER.json MAX_TOKENS: for each line of standard input, a JSON string, its ids as a JSON list.
// With --chat after them each string is a prompt and its chat form is encoded. With --raw all of standard input is one text,
// whatever its bytes. Errors: one line on standard error, exit status 1.
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

#include "core/tokenizer.h"

int main(int argc, char** argv) {
    const std::string option = argc == 4 ? argv[3] : "";
    if (argc < 3 || argc > 4 || (argc == 4 && option != "--chat" && option != "--raw")) {
        std::cerr << "usage: tokenizer_probe TOKENIZER.json MAX_TOKENS [--chat | --raw] < TEXT\n";
        return 2;
    }
    try {
        const auto tokenizer = diffusionz::Tokenizer::from_file(argv[1]);
        const size_t max_tokens = std::stoull(argv[2]);
        auto print_ids = [&](const std::string& text) {
            std::cout << nlohmann::json(tokenizer.encode(text, max_tokens)) << '\n';
        };
        if (option == "--raw") {
            print_ids(std::string(std::istreambuf_iterator<char>(std::cin), {}));
            return 0;
        }
        for (std::string line; std::getline(std::cin, line);) {
            const auto text = nlohmann::json::parse(line).get<std::string>();
            print_ids(option == "--chat" ? diffusionz::chat_form(text) : text);
        }
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
