// The launcher of append_rows: no CUDA and no framework types, so that any front door may include it.
#pragma once

#include <cstdint>

#include "megalodon/megalodon.h"

namespace megalodon {

/// The tensors of one launch and what they share; see mgd_append_rows.
struct AppendCall {
    mgd_append tensors[MGD_APPEND_TENSORS];
    int num_tensors;
    int64_t B, T, S, chunk_size;
    const int64_t* position;
};

/// Enqueues the kernel on `stream` and returns an mgd_status. The caller has checked sizes and pointers; B, T and the
/// number of tensors are at least 1.
int launch_append_rows(const AppendCall& call, void* stream);

}  // namespace megalodon
