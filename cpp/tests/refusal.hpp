// How tests see an error.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "megalodon/error.hpp"

namespace megalodon::test {

// The one line that `body` is refused with.
inline std::string message_of(const std::function<void()>& body, ErrorKind kind) {
    try {
        body();
    } catch (const Error& error) {
        EXPECT_EQ(error.kind(), kind) << error.what();
        EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
        return error.what();
    }
    ADD_FAILURE() << "nothing was thrown";
    return "";
}

}  // namespace megalodon::test
