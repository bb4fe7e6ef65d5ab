// Shared by the launchers and the C interface: how a launcher names an activation type and reports a failure.
#pragma once

#include <cstdint>

#include "megalodon/megalodon.h"

namespace megalodon {

constexpr int64_t kMaxBlocks = INT32_MAX;  // of a one-dimensional grid

/// The C interface's status for a CUDA runtime error code.
inline int status_of(int cuda_error) {
    return cuda_error == 0 ? MGD_OK : MGD_CUDA_ERROR + cuda_error;
}

/// What the CUDA runtime says about its error code.
const char* cuda_error_string(int cuda_error);

inline int64_t ceil_div(int64_t value, int64_t divisor) {
    return (value + divisor - 1) / divisor;
}

}  // namespace megalodon
