// Text to tokens and back. Byte tokenizers are built in; for others the application brings one, or works with tokens.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "megalodon/error.hpp"

namespace megalodon {

// Used by the thread of its session.
class MEGALODON_API Tokenizer {
 public:
    virtual ~Tokenizer() = default;

    // `start`: the text begins a stream, so tokens that open a text are added.
    virtual std::vector<std::int64_t> encode(std::string_view utf8, bool start) const = 0;

    // The bytes that a token stands for; empty for special tokens. Text is decoded from them incrementally.
    virtual std::string bytes_of(std::int64_t token) const = 0;
};

}  // namespace megalodon
