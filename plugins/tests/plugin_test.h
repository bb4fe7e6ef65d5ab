// GoogleTest's parameter: every entry of operators().
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "tests/harness.h"

namespace megalodon::tests {

class PluginTest : public testing::TestWithParam<size_t> {
 protected:
    static const Operator& op() { return operators()[GetParam()]; }
    static int32_t num_inputs() { return static_cast<int32_t>(op().inputs.size()); }
    static int32_t num_outputs() { return static_cast<int32_t>(op().outputs.size()); }
};

inline std::string name_of_operator(const testing::TestParamInfo<size_t>& info) {
    return std::string(operators()[info.param].name) + "_" + operators()[info.param].variant;
}

#define MEGALODON_TEST_EVERY_PLUGIN(Suite) \
    INSTANTIATE_TEST_SUITE_P(Plugins, Suite, testing::Range<size_t>(0, operators().size()), name_of_operator)

}  // namespace megalodon::tests
