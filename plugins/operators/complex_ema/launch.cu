#include "operators/complex_ema/launch.h"

#include "common/launch.h"
#include "operators/complex_ema/kernel.cuh"

namespace megalodon {
namespace {

constexpr int kBlockThreads = 128;

template <typename Activation, int kLanes, int kModes>
int launch_with(const ComplexEmaCall& call, cudaStream_t stream) {
    const int64_t num_blocks = ceil_div(call.B * call.D * kLanes, kBlockThreads);
    if (num_blocks > kMaxBlocks) return MGD_UNSUPPORTED;
    const auto kernel = complex_ema::complex_ema_kernel<Activation, kLanes, kModes>;
    return status_of(launch_kernel(kernel, num_blocks, kBlockThreads, stream, call));
}

/// Any N up to kLanes * kModes fits; the smallest such pair keeps the most channels in flight.
template <typename Activation>
int launch_as(const ComplexEmaCall& call, cudaStream_t stream) {
    if (call.N <= 4) return launch_with<Activation, 4, 1>(call, stream);
    if (call.N <= 8) return launch_with<Activation, 4, 2>(call, stream);
    if (call.N <= 16) return launch_with<Activation, 4, 4>(call, stream);
    if (call.N <= 32) return launch_with<Activation, 4, 8>(call, stream);
    static_assert(MGD_MAX_MODES == 32 * 8);
    return launch_with<Activation, 32, 8>(call, stream);
}

}  // namespace

int launch_complex_ema(int dtype, const ComplexEmaCall& call, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (dtype == MGD_FLOAT16) return launch_as<__half>(call, cuda_stream);
    if (dtype == MGD_BFLOAT16) return launch_as<__nv_bfloat16>(call, cuda_stream);
    return launch_as<float>(call, cuda_stream);
}

}  // namespace megalodon
