#pragma once

#include "megalodon/tokenizer.hpp"

namespace megalodon::detail {

// A token is a byte of UTF-8 text; higher tokens, if the model has any, stand for no text.
class BytesTokenizer : public Tokenizer {
 public:
    std::vector<std::int64_t> encode(std::string_view utf8, bool) const override {
        std::vector<std::int64_t> tokens;
        for (const char byte : utf8)
            tokens.push_back(static_cast<unsigned char>(byte));
        return tokens;
    }
    std::string bytes_of(std::int64_t token) const override {
        return token < 256 ? std::string(1, static_cast<char>(token)) : std::string();
    }
};

}  // namespace megalodon::detail
