// ComplexEMA's launcher: no CUDA and no framework types, so that any front door may include it.
#pragma once

#include <cstdint>

namespace megalodon {

/// One call; shapes and types of the tensors stand at mgd_complex_ema. Device pointers.
struct ComplexEmaCall {
    int64_t B, T, D, N;
    const void* x;
    const float* past;
    const int64_t* position;
    const float* p;
    const float* q;
    const float* gamma;
    const float* omega;
    void* y;
    float* present;
};

/// Enqueues the kernel on `stream` and returns an mgd_status. The caller has checked sizes and pointers; N is at most
/// MGD_MAX_MODES and B, D at least 1.
int launch_complex_ema(int dtype, const ComplexEmaCall& call, void* stream);

}  // namespace megalodon
