// ComplexEMA's launchers: no CUDA and no framework types, so that any front door may include them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megalodon {

/// What forward and backward read; shapes and types stand at mgd_complex_ema. Device pointers.
struct ComplexEmaInputs {
    int dtype;  // mgd_dtype of x, y and their gradients
    int64_t B, T, D, N;
    const void* x;
    const float* past;
    const int64_t* position;
    const float* p;
    const float* q;
    const float* gamma;
    const float* omega;
};

struct ComplexEmaCall {
    ComplexEmaInputs in;
    const int64_t* lengths;  // null: every row has T tokens
    void* y;
    float* present;
    void* workspace;
    size_t workspace_bytes;  // decides with the device whether rows are cut into segments
};

struct ComplexEmaBackwardCall {
    ComplexEmaInputs in;
    const void* grad_y;
    const float* grad_present;
    void* grad_x;
    float* grad_past;
    float* grad_p;
    float* grad_q;
    float* grad_gamma;
    float* grad_omega;
    void* workspace;
};

/// Bytes of workspace with which the forward pass may cut rows into segments, on any device.
size_t complex_ema_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t N);

/// Bytes of workspace that the backward pass needs.
size_t complex_ema_backward_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t N);

/// Enqueue the kernels on `stream` and return an mgd_status. The caller has checked sizes and pointers; N is at most
/// MGD_MAX_MODES, D at least 1, and B at least 1 in the forward pass.
int launch_complex_ema(const ComplexEmaCall& call, void* stream);
int launch_complex_ema_backward(const ComplexEmaBackwardCall& call, void* stream);

}  // namespace megalodon
