#include "operators/choose_token/launch.h"

#include "common/launch.h"
#include "operators/choose_token/kernel.cuh"

namespace megalodon {

int launch_choose_token(const ChooseTokenCall& call, void* stream) {
    if (call.B > kMaxBlocks) return MGD_UNSUPPORTED;
    const auto kernel = choose_token::choose_token_kernel;
    return status_of(launch_kernel(kernel, call.B, choose_token::kThreads, static_cast<cudaStream_t>(stream), call));
}

}  // namespace megalodon
