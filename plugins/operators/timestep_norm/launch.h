// TimestepNorm's launcher: no CUDA and no framework types, so that any front door may include it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megalodon {

/// One call; shapes and types of the tensors stand at mgd_timestep_norm. Device pointers.
struct TimestepNormCall {
    int64_t B, T, D, G;
    const void* x;
    const float* past;
    const int64_t* position;
    const float* weight;
    const float* bias;
    float epsilon;
    void* y;
    float* present;
    void* workspace;
};

/// Bytes of workspace for a call of these sizes.
size_t timestep_norm_workspace_bytes(int64_t B, int64_t T, int64_t G);

/// Enqueues the kernels on `stream` and returns an mgd_status. The caller has checked sizes and pointers; B, D and G
/// are at least 1.
int launch_timestep_norm(int dtype, const TimestepNormCall& call, void* stream);

}  // namespace megalodon
