// The launcher of choose_token: no CUDA and no framework types, so that any front door may include it.
#pragma once

#include <cstdint>

#include "megalodon/megalodon.h"

namespace megalodon {

/// One call; shapes and types of the tensors stand at mgd_choose_tokens. Device pointers.
struct ChooseTokenCall {
    int64_t B, V, max_recent;
    const float* logits;
    const mgd_choice* choices;
    const int64_t* recent;
    void* workspace;
    int64_t* tokens;
};

/// Enqueues the kernel on `stream` and returns an mgd_status. The caller has checked sizes and pointers; B and V are at
/// least 1.
int launch_choose_token(const ChooseTokenCall& call, void* stream);

}  // namespace megalodon
