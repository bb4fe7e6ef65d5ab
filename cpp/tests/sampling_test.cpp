// Sampling: what does not need Python to compare with.
#include "megalodon/sampling.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "pairwise_sum.hpp"

namespace megalodon::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(Sampling, SplitMix64GivesItsPublishedOutputs) {
    // From state 0 the reference implementation returns these words first (seed 0 mixes to state 0).
    Generator generator;
    for (const std::uint64_t word : {0xE220A8397B1DCDAFu, 0x6E789E6AA1B965F4u, 0x06C45D188009454Fu}) {
        EXPECT_EQ(generator.uniform(), static_cast<double>(word >> 11) * 0x1p-53);
    }
    EXPECT_EQ(generator.draws, 3u);
}

TEST(Sampling, GreedyTakesTheFirstOfEqualLogitsAndDrawsNothing) {
    Generator generator;
    EXPECT_EQ(choose_token({0, 3, 3, -1}, SamplingParams::greedy(), {}, generator), 1);
    EXPECT_EQ(generator.draws, 0u);
}

TEST(Sampling, ThePenaltyCountsATokenOnce) {
    Generator generator;
    SamplingParams params = SamplingParams::greedy();
    params.repetition_penalty = 2;
    params.repetition_window = 2;
    EXPECT_EQ(choose_token({3, 5, 2}, params, {1, 1}, generator), 0);    // 5 / 2
    EXPECT_EQ(choose_token({-2, -1.5, -9}, params, {1}, generator), 0);  // -1.5 * 2
    EXPECT_EQ(choose_token({3, 5, 2}, params, {1, 0, 2}, generator), 1) << "the oldest is outside the window";
}

TEST(Sampling, BrokenLogitsAreRefused) {
    Generator generator;
    for (const std::vector<float>& logits :
         {std::vector<float>{1, std::nanf(""), 2}, {1, kInfinity}, {-kInfinity}, {}}) {
        EXPECT_THROW(choose_token(logits, {}, {}, generator), Error);
    }
    EXPECT_EQ(choose_token({-kInfinity, 1}, {}, {}, generator), 1);
}

TEST(Sampling, ValuesOutOfRangeAreNamed) {
    const auto refused = [](auto change, const char* name) {
        SamplingParams params;
        change(params);
        try {
            check(params);
        } catch (const Error& error) {
            return std::string(error.what()).find(name) != std::string::npos;
        }
        return false;
    };
    const double nan = std::nan("");
    EXPECT_TRUE(refused([](auto& p) { p.temperature = -1; }, "temperature"));
    EXPECT_TRUE(refused([&](auto& p) { p.temperature = nan; }, "temperature"));
    EXPECT_TRUE(refused([](auto& p) { p.top_k = 0; }, "top_k"));
    EXPECT_TRUE(refused([](auto& p) { p.top_p = 0; }, "top_p"));
    EXPECT_TRUE(refused([](auto& p) { p.min_p = 1.5; }, "min_p"));
    EXPECT_TRUE(refused([](auto& p) { p.repetition_penalty = 0; }, "repetition_penalty"));
    EXPECT_TRUE(refused([](auto& p) { p.repetition_window = 1025; }, "repetition_window"));
}

TEST(Sampling, PairwiseSumsAreSums) {
    std::vector<double> values;
    for (int index = 0; index < 1000; ++index) {
        double expected = 0;
        for (const double value : values)
            expected += value;
        EXPECT_EQ(detail::pairwise_sum(values.data(), values.size()), expected) << "integers add up without rounding";
        values.push_back(index % 17);
    }
}

}  // namespace
}  // namespace megalodon::test
