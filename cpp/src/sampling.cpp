#include "megalodon/sampling.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <string>

#include "choice.hpp"
#include "formats.hpp"
#include "pairwise_sum.hpp"

namespace megalodon {

namespace {

constexpr std::uint64_t kGoldenGamma = 0x9E3779B97F4A7C15u;

// The output function of SplitMix64.
std::uint64_t mix(std::uint64_t word) {
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9u;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBu;
    return word ^ (word >> 31);
}

void require(bool is_valid, const char* name, const std::string& value, const char* expected) {
    if (is_valid) return;
    throw Error(ErrorKind::invalid_argument, std::string("sampling: ") + name + " = " + value + " is not " + expected);
}

using Tokens = std::vector<std::int64_t>;
using Weights = std::vector<double>;

void penalise(Weights& scores, const TokenChoice& choice) {
    const double penalty = choice.params.repetition_penalty;
    for (const std::int64_t token : choice.recent) {
        double& score = scores[static_cast<std::size_t>(token)];
        score = score > 0 ? score / penalty : score * penalty;
    }
}

// The index of the first largest score, or of the first NaN.
std::size_t best_of(const Weights& scores) {
    std::size_t best = 0;
    for (std::size_t index = 0; index < scores.size(); ++index) {
        if (std::isnan(scores[index])) return index;
        if (scores[index] > scores[best]) best = index;
    }
    return best;
}

Weights weights_of(const Weights& weights, const Tokens& tokens) {
    Weights chosen(tokens.size());
    std::transform(tokens.begin(), tokens.end(), chosen.begin(),
                   [&](std::int64_t token) { return weights[static_cast<std::size_t>(token)]; });
    return chosen;
}

// The k heaviest tokens in token order; of equal ones at the border the first.
Tokens top_k(const Weights& weights, std::size_t k) {
    Weights sorted = weights;
    std::nth_element(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(k - 1), sorted.end(),
                     std::greater<>());
    const double border = sorted[k - 1];
    const auto above = std::count_if(weights.begin(), weights.end(), [&](double weight) { return weight > border; });
    std::size_t room_at_border = k - static_cast<std::size_t>(above);
    Tokens tokens;
    for (std::size_t index = 0; index < weights.size(); ++index) {
        const bool fits = weights[index] > border || (weights[index] == border && room_at_border > 0);
        if (weights[index] == border && room_at_border > 0) --room_at_border;
        if (fits) tokens.push_back(static_cast<std::int64_t>(index));
    }
    return tokens;
}

// The fewest of `tokens` whose weights reach the share `share`, in token order.
Tokens top_p(const Weights& weights, const Tokens& tokens, double share) {
    const Weights chosen = weights_of(weights, tokens);
    const double total = detail::pairwise_sum(chosen.data(), chosen.size());
    // All tokens below the mean of the excess mass together have less than the excess: no need to sort those.
    const double least = (1.0 - share) * total / static_cast<double>(tokens.size());
    Tokens order;
    std::copy_if(tokens.begin(), tokens.end(), std::back_inserter(order),
                 [&](std::int64_t token) { return weights[static_cast<std::size_t>(token)] >= least; });
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t left, std::int64_t right) {
        return weights[static_cast<std::size_t>(left)] > weights[static_cast<std::size_t>(right)];
    });
    double reached = 0.0;
    std::size_t count = 0;
    while (count < order.size()) {
        reached += weights[static_cast<std::size_t>(order[count++])];
        if (reached >= share * total) break;
    }
    order.resize(count);
    std::sort(order.begin(), order.end());
    return order;
}

// Weights relative to the most probable token, and the tokens that may be drawn, in token order.
Tokens candidates(const Weights& weights, const SamplingParams& params) {
    Tokens tokens(weights.size());
    std::iota(tokens.begin(), tokens.end(), 0);
    if (params.top_k && *params.top_k < weights.size())
        tokens = top_k(weights, static_cast<std::size_t>(*params.top_k));
    if (params.top_p < 1.0) tokens = top_p(weights, tokens, params.top_p);
    if (params.min_p > 0.0) {
        const auto is_light = [&](std::int64_t token) {
            return weights[static_cast<std::size_t>(token)] < params.min_p;
        };
        tokens.erase(std::remove_if(tokens.begin(), tokens.end(), is_light), tokens.end());
    }
    return tokens;
}

}  // namespace

double detail::pairwise_sum(const double* values, std::size_t count) {
    if (count < 8) return std::accumulate(values, values + count, 0.0);
    if (count > 128) {
        const std::size_t half = count / 2 - count / 2 % 8;
        return pairwise_sum(values, half) + pairwise_sum(values + half, count - half);
    }
    double sums[8];
    std::copy(values, values + 8, sums);
    std::size_t index = 8;
    for (; index < count - count % 8; index += 8) {
        for (std::size_t lane = 0; lane < 8; ++lane)
            sums[lane] += values[index + lane];
    }
    const double total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    return std::accumulate(values + index, values + count, total);
}

void check(const SamplingParams& params) {
    const auto text = [](auto value) { return std::to_string(value); };
    require(params.temperature >= 0.0 && std::isfinite(params.temperature), "temperature", text(params.temperature),
            "0 or a positive number");
    require(params.top_p > 0.0 && params.top_p <= 1.0, "top_p", text(params.top_p), "a number above 0 and at most 1");
    require(params.min_p >= 0.0 && params.min_p <= 1.0, "min_p", text(params.min_p), "a number from 0 to 1");
    require(params.repetition_penalty > 0.0 && std::isfinite(params.repetition_penalty), "repetition_penalty",
            text(params.repetition_penalty), "a positive number");
    require(params.repetition_window >= 0 && params.repetition_window <= kHistoryTokens, "repetition_window",
            text(params.repetition_window), "an integer from 0 to 1024");
    require(!params.top_k || *params.top_k >= 1, "top_k", "0", "a positive integer");
}

double Generator::uniform() {
    ++draws;
    return static_cast<double>(mix(mix(seed) + draws * kGoldenGamma) >> 11) * 0x1p-53;
}

Generator Generator::from_system() {
    std::random_device device;
    const std::uint64_t high = device();
    return {(high << 32) | device(), 0};
}

std::vector<std::int64_t> detail::penalised_tokens(const Tokens& recent, const SamplingParams& params) {
    const std::size_t window = std::min<std::size_t>(static_cast<std::size_t>(params.repetition_window), recent.size());
    if (params.repetition_penalty == 1.0 || window == 0) return {};
    Tokens seen(recent.end() - static_cast<std::ptrdiff_t>(window), recent.end());
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    return seen;
}

TokenChoice detail::choice_of(const SamplingParams& params, const Tokens& recent, Generator& generator) {
    check(params);
    const double uniform = params.temperature > 0.0 ? generator.uniform() : 0.0;
    return {true, params, uniform, penalised_tokens(recent, params)};
}

std::int64_t detail::choose(const std::vector<float>& logits, const TokenChoice& choice) {
    Weights scores(logits.begin(), logits.end());
    penalise(scores, choice);
    const std::size_t best = best_of(scores);
    if (!std::isfinite(scores[best])) return kNoToken;
    if (choice.params.temperature == 0.0) return static_cast<std::int64_t>(best);
    const double largest = scores[best];
    for (double& score : scores)
        score = std::exp((score - largest) / choice.params.temperature);
    const Tokens tokens = candidates(scores, choice.params);
    Weights cumulative = weights_of(scores, tokens);
    const double total = pairwise_sum(cumulative.data(), cumulative.size());
    double sum = 0.0;
    for (double& weight : cumulative)
        weight = sum += weight / total;
    const auto found = std::upper_bound(cumulative.begin(), cumulative.end(), choice.uniform * cumulative.back());
    const auto index = std::min<std::size_t>(static_cast<std::size_t>(found - cumulative.begin()), tokens.size() - 1);
    return tokens[index];
}

std::int64_t choose_token(const std::vector<float>& logits, const SamplingParams& params, const Tokens& recent,
                          Generator& generator) {
    if (logits.empty()) throw Error(ErrorKind::invalid_argument, "there are no logits to choose from");
    const auto size = static_cast<std::int64_t>(logits.size());
    for (const std::int64_t token : recent) {
        if (token >= 0 && token < size) continue;
        throw Error(ErrorKind::invalid_argument,
                    "recent token " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(size));
    }
    const std::int64_t token = detail::choose(logits, detail::choice_of(params, recent, generator));
    if (token == detail::kNoToken) throw Error(ErrorKind::state, detail::kBrokenStream);
    return token;
}

}  // namespace megalodon
