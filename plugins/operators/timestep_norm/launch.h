// TimestepNorm's launchers: no CUDA and no framework types, so that any front door may include them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megalodon {

/// What forward and backward read; shapes and types stand at mgd_timestep_norm. Device pointers.
struct TimestepNormInputs {
    int64_t B, T, D, G;
    const void* x;
    const float* past;
    const int64_t* position;
    const float* weight;
    float epsilon;
};

struct TimestepNormCall {
    TimestepNormInputs in;
    const float* bias;
    const int64_t* lengths;  // null: every row has T tokens
    void* y;
    float* present;
    void* workspace;
};

struct TimestepNormBackwardCall {
    TimestepNormInputs in;
    const void* grad_y;
    const float* grad_present;
    void* grad_x;
    float* grad_past;
    float* grad_weight;
    float* grad_bias;
    void* workspace;
};

/// Bytes of workspace for calls of these sizes.
size_t timestep_norm_workspace_bytes(int64_t B, int64_t T, int64_t G);
size_t timestep_norm_backward_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t G);

/// Enqueue the kernels on `stream` and return an mgd_status. The caller has checked sizes and pointers; D and G are at
/// least 1, and B at least 1 in the forward pass.
int launch_timestep_norm(int dtype, const TimestepNormCall& call, void* stream);
int launch_timestep_norm_backward(int dtype, const TimestepNormBackwardCall& call, void* stream);

}  // namespace megalodon
