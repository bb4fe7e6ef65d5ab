// A token from logits and a number that was drawn before: what `choose_token` and the engines share.
#pragma once

#include <cstdint>
#include <vector>

#include "megalodon/engine.hpp"

namespace megalodon::detail {

constexpr std::int64_t kNoToken = -1;
constexpr char kBrokenStream[] = "the stream is broken: its logits are not finite; start or resume another stream";

// The distinct tokens of the window, ascending, to which the repetition penalty applies; none without a penalty.
std::vector<std::int64_t> penalised_tokens(const std::vector<std::int64_t>& recent, const SamplingParams& params);

// What is chosen with these settings, with one draw from the generator unless the temperature is 0.
TokenChoice choice_of(const SamplingParams& params, const std::vector<std::int64_t>& recent, Generator& generator);

// The next token; kNoToken when a logit is NaN or infinite upwards, or all are -inf.
std::int64_t choose(const std::vector<float>& logits, const TokenChoice& choice);

}  // namespace megalodon::detail
