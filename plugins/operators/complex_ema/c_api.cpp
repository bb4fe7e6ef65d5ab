#include "c_api/checks.h"
#include "operators/complex_ema/launch.h"

using megalodon::is_activation;
using megalodon::is_workspace;
using megalodon::none_negative;
using megalodon::none_null;
using megalodon::without_exceptions;

size_t mgd_complex_ema_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t N) {
    return none_negative(B, T, D, N) ? megalodon::complex_ema_workspace_bytes(B, T, D, N) : 0;
}

int mgd_complex_ema(int dtype, int64_t B, int64_t T, int64_t D, int64_t N, const void* x, const float* past,
                    const int64_t* position, const float* p, const float* q, const float* gamma, const float* omega,
                    const int64_t* lengths, void* y, float* present, void* workspace, size_t workspace_bytes,
                    void* stream) {
    return without_exceptions([&]() -> int {
        if (!is_activation(dtype) || !none_negative(B, T, D) || N < 1) return MGD_INVALID_ARGUMENT;
        if (B == 0 || D == 0) return MGD_OK;
        if (!none_null(past, position, p, q, gamma, omega, present)) return MGD_INVALID_ARGUMENT;
        if (T > 0 && (!none_null(x, static_cast<const void*>(y)) || x == y)) return MGD_INVALID_ARGUMENT;
        if (past == present || !is_workspace(workspace, workspace_bytes, 0)) return MGD_INVALID_ARGUMENT;
        if (N > MGD_MAX_MODES) return MGD_UNSUPPORTED;
        const megalodon::ComplexEmaInputs inputs{dtype, B, T, D, N, x, past, position, p, q, gamma, omega};
        const megalodon::ComplexEmaCall call{inputs, lengths, y, present, workspace, workspace_bytes};
        return megalodon::launch_complex_ema(call, stream);
    });
}

size_t mgd_complex_ema_backward_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t N) {
    return none_negative(B, T, D, N) ? megalodon::complex_ema_backward_workspace_bytes(B, T, D, N) : 0;
}

int mgd_complex_ema_backward(int dtype, int64_t B, int64_t T, int64_t D, int64_t N, const void* x, const float* past,
                             const int64_t* position, const float* p, const float* q, const float* gamma,
                             const float* omega, const void* grad_y, const float* grad_present, void* grad_x,
                             float* grad_past, float* grad_p, float* grad_q, float* grad_gamma, float* grad_omega,
                             void* workspace, size_t workspace_bytes, void* stream) {
    return without_exceptions([&]() -> int {
        if (!is_activation(dtype) || !none_negative(B, T, D) || N < 1) return MGD_INVALID_ARGUMENT;
        if (D == 0) return MGD_OK;
        if (!none_null(p, q, gamma, omega, grad_p, grad_q, grad_gamma, grad_omega)) return MGD_INVALID_ARGUMENT;
        if (B > 0 && !none_null(past, position, grad_present, grad_past)) return MGD_INVALID_ARGUMENT;
        if (B * T > 0 && !none_null(x, grad_y, static_cast<const void*>(grad_x))) return MGD_INVALID_ARGUMENT;
        if (B * T > 0 && (x == grad_x || grad_y == grad_x)) return MGD_INVALID_ARGUMENT;
        if (N > MGD_MAX_MODES) return MGD_UNSUPPORTED;
        const size_t needed_bytes = megalodon::complex_ema_backward_workspace_bytes(B, T, D, N);
        if (!is_workspace(workspace, workspace_bytes, needed_bytes)) return MGD_INVALID_ARGUMENT;
        const megalodon::ComplexEmaInputs inputs{dtype, B, T, D, N, x, past, position, p, q, gamma, omega};
        const megalodon::ComplexEmaBackwardCall call{inputs, grad_y, grad_present, grad_x,     grad_past,
                                                     grad_p, grad_q, grad_gamma,   grad_omega, workspace};
        return megalodon::launch_complex_ema_backward(call, stream);
    });
}
