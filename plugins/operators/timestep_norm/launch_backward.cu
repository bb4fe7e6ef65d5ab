#include "common/column_sums.cuh"
#include "operators/timestep_norm/backward.cuh"
#include "operators/timestep_norm/launch.h"
#include "operators/timestep_norm/launch_steps.cuh"

namespace megalodon {
namespace {

using timestep_norm::BackwardWorkspace;
using timestep_norm::GradientSums;
using timestep_norm::kGradientTokens;
using timestep_norm::Normaliser;

constexpr int kBlockThreads = 128;
static_assert(kGradientTokens >= timestep_norm::kNormaliseTokens, "launch_token_sums has checked the larger grid");

int64_t num_chunks(int64_t B, int64_t T) {
    return B * ceil_div(T, kGradientTokens);
}

BackwardWorkspace workspace_of(const TimestepNormBackwardCall& call) {
    const int64_t num_tokens = call.in.B * call.in.G * call.in.T;
    auto* tokens = static_cast<Normaliser*>(call.workspace);
    auto* sums = reinterpret_cast<GradientSums*>(tokens + num_tokens);
    return {tokens, sums, reinterpret_cast<float*>(sums + num_tokens)};
}

template <typename Activation, int kSize>
int launch_gradients(const TimestepNormBackwardCall& call, const BackwardWorkspace& workspace, cudaStream_t stream) {
    const int64_t num_blocks = timestep_norm::num_column_blocks<kSize>(call.in, kGradientTokens);
    const auto kernel = timestep_norm::gradients_kernel<Activation, kSize>;
    return status_of(launch_kernel(kernel, num_blocks, timestep_norm::kColumnThreads, stream, call, workspace));
}

template <typename Activation>
int launch_rows(const TimestepNormBackwardCall& call, const BackwardWorkspace& workspace, cudaStream_t stream) {
    const TimestepNormInputs& in = call.in;
    int status =
        timestep_norm::launch_token_sums<Activation, true>(in, call.grad_y, workspace.tokens, workspace.sums, stream);
    if (status != MGD_OK) return status;
    status = status_of(launch_kernel(timestep_norm::scan_gradients_kernel, in.B * in.G, timestep_norm::kScanThreads,
                                     stream, call, workspace));
    if (status != MGD_OK) return status;
    if (timestep_norm::takes_packs<Activation>(in, {in.x, call.grad_y, call.grad_x})) {
        return launch_gradients<Activation, kPackSize<Activation>>(call, workspace, stream);
    }
    return launch_gradients<Activation, 1>(call, workspace, stream);
}

template <typename Activation>
int launch_as(const TimestepNormBackwardCall& call, cudaStream_t stream) {
    const TimestepNormInputs& in = call.in;
    const BackwardWorkspace workspace = workspace_of(call);
    int status = MGD_OK;
    if (in.B > 0 && in.T > 0) {
        status = launch_rows<Activation>(call, workspace, stream);
    } else if (in.B > 0) {
        const int64_t num_blocks = ceil_div(in.B * in.G, kBlockThreads);
        if (num_blocks > kMaxBlocks) return MGD_UNSUPPORTED;
        status =
            status_of(launch_kernel(timestep_norm::copy_gradients_kernel, num_blocks, kBlockThreads, stream, call));
    }
    if (status != MGD_OK) return status;
    const int64_t rows = num_chunks(in.B, in.T);
    status = launch_column_sums(workspace.chunk_sums, rows, in.D, 2 * in.D, call.grad_weight, stream);
    if (status != MGD_OK) return status;
    return launch_column_sums(workspace.chunk_sums + in.D, rows, in.D, 2 * in.D, call.grad_bias, stream);
}

}  // namespace

size_t timestep_norm_backward_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t G) {
    const auto num_tokens = static_cast<size_t>(B * G * T);
    return num_tokens * (sizeof(Normaliser) + sizeof(GradientSums)) +
           static_cast<size_t>(num_chunks(B, T) * 2 * D) * sizeof(float);
}

int launch_timestep_norm_backward(int dtype, const TimestepNormBackwardCall& call, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    if (dtype == MGD_FLOAT16) return launch_as<__half>(call, cuda_stream);
    if (dtype == MGD_BFLOAT16) return launch_as<__nv_bfloat16>(call, cuda_stream);
    return launch_as<float>(call, cuda_stream);
}

}  // namespace megalodon
