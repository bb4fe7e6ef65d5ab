#include "operators/timestep_norm/launch.h"

#include "common/launch.h"
#include "operators/timestep_norm/kernel.cuh"

namespace megalodon {
namespace {

constexpr int64_t kFewTokens = 16;  // up to here one kernel that walks the tokens is less than three launches
constexpr int kBlockThreads = 128;
constexpr int kPrefixThreads = 256;

template <typename Activation>
int launch_few_tokens(const TimestepNormCall& call, cudaStream_t stream) {
    const int64_t num_blocks = ceil_div(call.B * call.G * kWarpSize, kBlockThreads);
    if (num_blocks > kMaxBlocks) return MGD_UNSUPPORTED;
    const auto kernel = timestep_norm::few_tokens_kernel<Activation>;
    return status_of(launch_kernel(kernel, num_blocks, kBlockThreads, stream, call));
}

template <typename Activation>
int launch_many_tokens(const TimestepNormCall& call, cudaStream_t stream) {
    const int64_t num_tokens = call.B * call.T, num_groups = call.B * call.G;
    if (num_tokens > kMaxBlocks || num_groups > kMaxBlocks || call.D > INT32_MAX) return MGD_UNSUPPORTED;
    const auto moments = timestep_norm::token_moments_kernel<Activation>;
    const auto prefix = timestep_norm::prefix_kernel<kPrefixThreads>;
    const auto normalise = timestep_norm::normalise_kernel<Activation>;
    if (int status = status_of(launch_kernel(moments, num_tokens, kBlockThreads, stream, call))) return status;
    if (int status = status_of(launch_kernel(prefix, num_groups, kPrefixThreads, stream, call))) return status;
    return status_of(launch_kernel(normalise, num_tokens, kBlockThreads, stream, call));
}

template <typename Activation>
int launch_as(const TimestepNormCall& call, cudaStream_t stream) {
    return call.T <= kFewTokens ? launch_few_tokens<Activation>(call, stream)
                                : launch_many_tokens<Activation>(call, stream);
}

}  // namespace

size_t timestep_norm_workspace_bytes(int64_t B, int64_t T, int64_t G) {
    if (T <= kFewTokens) return 0;
    return static_cast<size_t>(B) * static_cast<size_t>(T) * static_cast<size_t>(G) * sizeof(timestep_norm::Normaliser);
}

int launch_timestep_norm(int dtype, const TimestepNormCall& call, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (dtype == MGD_FLOAT16) return launch_as<__half>(call, cuda_stream);
    if (dtype == MGD_BFLOAT16) return launch_as<__nv_bfloat16>(call, cuda_stream);
    return launch_as<float>(call, cuda_stream);
}

}  // namespace megalodon
