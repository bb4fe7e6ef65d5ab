#include "common/column_sums.cuh"
#include "common/launch.h"
#include "operators/complex_ema/backward.cuh"
#include "operators/complex_ema/launch.h"

namespace megalodon {
namespace {

using complex_ema::RowGradients;

/// How the workspace is used, in floats. With one row its gradients are the result and need no place of their own.
struct Workspace {
    int64_t checkpoints, row_modes, row_channels;

    int64_t num_floats() const { return checkpoints + (1 + 2 * kComplexParts) * row_modes + row_channels; }
};

Workspace workspace_of(int64_t B, int64_t T, int64_t D, int64_t N) {
    const int64_t tile_tokens =
        complex_ema::with_layout(N, [](auto layout) { return complex_ema::BackwardShape<decltype(layout)>::kTokens; });
    const int64_t rows = B > 1 ? B : 0;
    return {ceil_div(T, tile_tokens) * B * D * N * kComplexParts, rows * D * N, rows * D};
}

RowGradients row_gradients(const ComplexEmaBackwardCall& call, const Workspace& workspace) {
    if (workspace.row_modes == 0) return {call.grad_p, call.grad_q, call.grad_gamma, call.grad_omega};
    float* p = static_cast<float*>(call.workspace) + workspace.checkpoints;
    float* q = p + workspace.row_modes;
    float* gamma = q + workspace.row_modes * kComplexParts;
    return {p, q, gamma, gamma + workspace.row_modes * kComplexParts};
}

/// Adds up the rows' gradients of the coefficients.
int launch_row_sums(const ComplexEmaBackwardCall& call, const RowGradients& rows, cudaStream_t stream) {
    const int64_t num_modes = call.in.D * call.in.N;
    const struct {
        const float* rows;
        float* sum;
        int64_t size;
    } gradients[] = {{rows.p, call.grad_p, num_modes},
                     {rows.q, call.grad_q, num_modes * kComplexParts},
                     {rows.gamma, call.grad_gamma, num_modes * kComplexParts},
                     {rows.omega, call.grad_omega, call.in.D}};
    for (const auto& gradient : gradients) {
        const int status =
            launch_column_sums(gradient.rows, call.in.B, gradient.size, gradient.size, gradient.sum, stream);
        if (status != MGD_OK) return status;
    }
    return MGD_OK;
}

template <typename Layout>
int launch_with(const ComplexEmaBackwardCall& call, cudaStream_t stream) {
    const ComplexEmaInputs& in = call.in;
    const Workspace workspace = workspace_of(in.B, in.T, in.D, in.N);
    const RowGradients rows = row_gradients(call, workspace);
    const int64_t num_blocks = in.B * ceil_div(in.D, Layout::kChannels);
    if (num_blocks > kMaxBlocks) return MGD_UNSUPPORTED;
    if (num_blocks > 0) {
        float* checkpoints = static_cast<float*>(call.workspace);
        int status = MGD_OK;
        if (in.T > 0) {
            const auto first_walk = complex_ema::checkpoint_kernel<Layout>;
            status = status_of(launch_kernel(first_walk, num_blocks, Layout::kThreads, stream, in, checkpoints));
        }
        if (status != MGD_OK) return status;
        const auto second_walk = complex_ema::backward_kernel<Layout>;
        const float* states = checkpoints;
        status = status_of(launch_kernel(second_walk, num_blocks, Layout::kThreads, stream, call, states, rows));
        if (status != MGD_OK) return status;
    }
    return in.B == 1 ? MGD_OK : launch_row_sums(call, rows, stream);
}

}  // namespace

size_t complex_ema_backward_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t N) {
    if (N < 1 || N > MGD_MAX_MODES) return 0;
    return static_cast<size_t>(workspace_of(B, T, D, N).num_floats()) * sizeof(float);
}

int launch_complex_ema_backward(const ComplexEmaBackwardCall& call, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    return complex_ema::with_layout(call.in.N,
                                    [&](auto layout) { return launch_with<decltype(layout)>(call, cuda_stream); });
}

}  // namespace megalodon
