// What every function of the C interface asks of its arguments.
#pragma once

#include <cstddef>
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

/// Whether there is enough memory, aligned for the kernels; none is needed for no bytes.
inline bool is_workspace(const void* workspace, size_t size_bytes, size_t needed_bytes) {
    const bool is_aligned = workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % 16 == 0;
    return size_bytes >= needed_bytes && (is_aligned || size_bytes == 0);
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
