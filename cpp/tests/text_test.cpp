// Stop strings and half precision; decoding itself is compared with Python's.
#include <gtest/gtest.h>

#include <cmath>

#include "convert.hpp"
#include "half.hpp"
#include "megalodon/error.hpp"
#include "stop_strings.hpp"

namespace megalodon::test {
namespace {

TEST(StopStrings, HoldBackWhatMayBeginOne) {
    detail::StopStrings stops({"abac", "\xE2\x82\xAC"});
    EXPECT_EQ(stops.push("xab"), std::make_pair(std::string("x"), false));
    EXPECT_EQ(stops.push("a"), std::make_pair(std::string(), false));
    EXPECT_EQ(stops.push("bac!"), std::make_pair(std::string("ab"), true));
    EXPECT_EQ(stops.push("ab\xE2\x82\xAC"), std::make_pair(std::string("ab"), true));
    EXPECT_EQ(stops.push("ab"), std::make_pair(std::string(), false));
    EXPECT_EQ(stops.flush(), "ab");
    EXPECT_THROW(detail::StopStrings({""}), Error);
}

TEST(Half, EveryFloat16SurvivesAFloat) {
    for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {
        const auto half = static_cast<std::uint16_t>(bits);
        const float value = detail::from_float16(half);
        if (std::isnan(value)) {
            EXPECT_TRUE(std::isnan(detail::from_float16(detail::to_float16(value))));
        } else {
            ASSERT_EQ(detail::to_float16(value), half);
        }
    }
}

TEST(Half, ACastThatOverflowsIsRefused) {
    HostTensor tensor{DType::float32, {1}, std::vector<std::byte>(4)};
    const float value = 1e6f;
    std::memcpy(tensor.data.data(), &value, 4);
    EXPECT_NO_THROW(detail::cast(tensor, DType::bfloat16, "x"));
    EXPECT_THROW(detail::cast(tensor, DType::float16, "x"), Error);
    EXPECT_THROW(detail::cast(tensor, DType::int8, "x"), Error);
}

}  // namespace
}  // namespace megalodon::test
