// What every function of the C interface asks of its arguments.
#pragma once

#include <cstdint>

#include "megalodon/megalodon.h"

namespace megalodon {

inline bool is_activation(int dtype) {
    return dtype == MGD_FLOAT32 || dtype == MGD_FLOAT16 || dtype == MGD_BFLOAT16;
}

template <typename... Sizes>
bool none_negative(Sizes... sizes) {
    return ((sizes >= 0) && ...);
}

template <typename... Pointers>
bool none_null(Pointers... pointers) {
    return ((pointers != nullptr) && ...);
}

/// Runs `body` so that nothing is thrown across the C interface.
template <typename Body>
int without_exceptions(Body body) noexcept {
    try {
        return body();
    } catch (...) {
        return MGD_INTERNAL_ERROR;
    }
}

}  // namespace megalodon
