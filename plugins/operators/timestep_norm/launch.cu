#include "operators/timestep_norm/launch.h"

#include "common/launch.h"
#include "operators/timestep_norm/few_tokens.cuh"
#include "operators/timestep_norm/launch_steps.cuh"
#include "operators/timestep_norm/prefix.cuh"

namespace megalodon {
namespace {

using timestep_norm::Normaliser;

constexpr int64_t kFewTokens = 16;  // up to here one kernel that walks the tokens is less than three launches
constexpr int kBlockThreads = 128;

template <typename Activation>
int launch_few_tokens(const TimestepNormCall& call, cudaStream_t stream) {
    const int64_t num_blocks = ceil_div(call.in.B * call.in.G * kWarpSize, kBlockThreads);
    if (num_blocks > kMaxBlocks) return MGD_UNSUPPORTED;
    const auto kernel = timestep_norm::few_tokens_kernel<Activation>;
    return status_of(launch_kernel(kernel, num_blocks, kBlockThreads, stream, call));
}

template <typename Activation, int kSize>
int launch_normalise(const TimestepNormCall& call, cudaStream_t stream) {
    const int64_t num_blocks = timestep_norm::num_column_blocks<kSize>(call.in, timestep_norm::kNormaliseTokens);
    const auto kernel = timestep_norm::normalise_kernel<Activation, kSize>;
    return status_of(launch_kernel(kernel, num_blocks, timestep_norm::kColumnThreads, stream, call));
}

template <typename Activation>
int launch_many_tokens(const TimestepNormCall& call, cudaStream_t stream) {
    auto* tokens = static_cast<Normaliser*>(call.workspace);
    int status = timestep_norm::launch_token_sums<Activation, false>(call.in, nullptr, tokens, nullptr, stream);
    if (status != MGD_OK) return status;
    status = status_of(
        launch_kernel(timestep_norm::prefix_kernel, call.in.B * call.in.G, timestep_norm::kScanThreads, stream, call));
    if (status != MGD_OK) return status;
    if (timestep_norm::takes_packs<Activation>(call.in, {call.in.x, call.y})) {
        return launch_normalise<Activation, kPackSize<Activation>>(call, stream);
    }
    return launch_normalise<Activation, 1>(call, stream);
}

template <typename Activation>
int launch_as(const TimestepNormCall& call, cudaStream_t stream) {
    return call.in.T <= kFewTokens ? launch_few_tokens<Activation>(call, stream)
                                   : launch_many_tokens<Activation>(call, stream);
}

}  // namespace

size_t timestep_norm_workspace_bytes(int64_t B, int64_t T, int64_t G) {
    return T <= kFewTokens ? 0 : static_cast<size_t>(B * T * G) * sizeof(Normaliser);
}

int launch_timestep_norm(int dtype, const TimestepNormCall& call, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (dtype == MGD_FLOAT16) return launch_as<__half>(call, cuda_stream);
    if (dtype == MGD_BFLOAT16) return launch_as<__nv_bfloat16>(call, cuda_stream);
    return launch_as<float>(call, cuda_stream);
}

}  // namespace megalodon
