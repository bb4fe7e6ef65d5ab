#include "operators/norm_ema/launch.h"

#include "common/launch.h"
#include "operators/norm_ema/step.cuh"

namespace megalodon {
namespace {

template <typename Layout>
int launch_step(const NormEmaCall& call, cudaStream_t stream) {
    const int64_t num_blocks = call.ema.in.B * ceil_div(call.ema.in.D, Layout::kChannels);
    if (num_blocks > kMaxBlocks) return MGD_UNSUPPORTED;
    return status_of(launch_kernel(norm_ema::step_kernel<Layout>, num_blocks, Layout::kThreads, stream, call));
}

}  // namespace

size_t norm_ema_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t G, int64_t N) {
    const size_t norm = timestep_norm_workspace_bytes(B, T, G), ema = complex_ema_workspace_bytes(B, T, D, N);
    return norm > ema ? norm : ema;
}

int launch_norm_ema(const NormEmaCall& call, void* stream) {
    if (call.ema.in.T == 1) {
        return complex_ema::with_layout(call.ema.in.N, [&](auto layout) {
            return launch_step<decltype(layout)>(call, static_cast<cudaStream_t>(stream));
        });
    }
    if (int status = launch_timestep_norm(call.ema.in.dtype, call.norm, stream); status != MGD_OK) return status;
    return launch_complex_ema(call.ema, stream);
}

}  // namespace megalodon
