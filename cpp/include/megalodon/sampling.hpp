// Choosing the next token from logits, with the arithmetic of the Python runtime: the same seed gives the same tokens.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "megalodon/error.hpp"

namespace megalodon {

struct SamplingParams {
    double temperature = 1.0;            // 0: always the most probable token
    std::optional<std::uint64_t> top_k;  // keep the k most probable tokens
    double top_p = 1.0;                  // keep the fewest most probable tokens that together have this probability
    double min_p = 0.0;                  // keep tokens with at least this share of the most probable one's probability
    double repetition_penalty = 1.0;     // positive logits of recent tokens are divided by it, negative ones multiplied
    int repetition_window = 256;         // how many recent tokens, prompt included, the penalty looks at
    std::optional<std::uint64_t> seed;   // none: continue the stream's generator; a fresh stream asks the system

    static SamplingParams greedy() {
        SamplingParams params;
        params.temperature = 0.0;
        return params;
    }
};

// Throws Error (invalid_argument) naming the first value out of range.
MEGALODON_API void check(const SamplingParams& params);

// SplitMix64 in counter form (Steele, Lea, Flood 2014): the whole state is the seed and the number of draws.
struct MEGALODON_API Generator {
    std::uint64_t seed = 0;
    std::uint64_t draws = 0;

    double uniform();  // the next number in [0, 1), a multiple of 2^-53
    static Generator from_system();
};

// The next token. `logits`: [V]; `recent`: the stream's last tokens, newest last. Throws Error (state) when a logit is
// NaN or infinite upwards, or all are -inf.
MEGALODON_API std::int64_t choose_token(const std::vector<float>& logits, const SamplingParams& params,
                                        const std::vector<std::int64_t>& recent, Generator& generator);

}  // namespace megalodon
