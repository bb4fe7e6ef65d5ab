#include <cmath>

#include "c_api/checks.h"
#include "operators/timestep_norm/launch.h"

using megalodon::is_activation;
using megalodon::is_workspace;
using megalodon::none_negative;
using megalodon::none_null;
using megalodon::without_exceptions;

size_t mgd_timestep_norm_workspace_bytes(int64_t B, int64_t T, int64_t G) {
    return none_negative(B, T, G) ? megalodon::timestep_norm_workspace_bytes(B, T, G) : 0;
}

int mgd_timestep_norm(int dtype, int64_t B, int64_t T, int64_t D, int64_t G, const void* x, const float* past,
                      const int64_t* position, const float* weight, const float* bias, float epsilon,
                      const int64_t* lengths, void* y, float* present, void* workspace, size_t workspace_bytes,
                      void* stream) {
    return without_exceptions([&]() -> int {
        if (!is_activation(dtype) || !none_negative(B, T, D) || G < 1 || D % G != 0) return MGD_INVALID_ARGUMENT;
        if (!std::isfinite(epsilon) || epsilon <= 0) return MGD_INVALID_ARGUMENT;
        if (B == 0 || D == 0) return MGD_OK;
        if (!none_null(past, position, weight, bias, present) || past == present) return MGD_INVALID_ARGUMENT;
        if (T > 0 && (!none_null(x, static_cast<const void*>(y)) || x == y)) return MGD_INVALID_ARGUMENT;
        const size_t needed_bytes = megalodon::timestep_norm_workspace_bytes(B, T, G);
        if (!is_workspace(workspace, workspace_bytes, needed_bytes)) return MGD_INVALID_ARGUMENT;
        const megalodon::TimestepNormInputs inputs{B, T, D, G, x, past, position, weight, epsilon};
        const megalodon::TimestepNormCall call{inputs, bias, lengths, y, present, workspace};
        return megalodon::launch_timestep_norm(dtype, call, stream);
    });
}

size_t mgd_timestep_norm_backward_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t G) {
    return none_negative(B, T, D, G) ? megalodon::timestep_norm_backward_workspace_bytes(B, T, D, G) : 0;
}

int mgd_timestep_norm_backward(int dtype, int64_t B, int64_t T, int64_t D, int64_t G, const void* x, const float* past,
                               const int64_t* position, const float* weight, float epsilon, const void* grad_y,
                               const float* grad_present, void* grad_x, float* grad_past, float* grad_weight,
                               float* grad_bias, void* workspace, size_t workspace_bytes, void* stream) {
    return without_exceptions([&]() -> int {
        if (!is_activation(dtype) || !none_negative(B, T, D) || G < 1 || D % G != 0) return MGD_INVALID_ARGUMENT;
        if (!std::isfinite(epsilon) || epsilon <= 0) return MGD_INVALID_ARGUMENT;
        if (D == 0) return MGD_OK;
        if (!none_null(weight, grad_weight, grad_bias)) return MGD_INVALID_ARGUMENT;
        if (B > 0 && !none_null(past, position, grad_present, grad_past)) return MGD_INVALID_ARGUMENT;
        if (B * T > 0 && !none_null(x, grad_y, static_cast<const void*>(grad_x))) return MGD_INVALID_ARGUMENT;
        if (B * T > 0 && (x == grad_x || grad_y == grad_x)) return MGD_INVALID_ARGUMENT;
        const size_t needed_bytes = megalodon::timestep_norm_backward_workspace_bytes(B, T, D, G);
        if (!is_workspace(workspace, workspace_bytes, needed_bytes)) return MGD_INVALID_ARGUMENT;
        const megalodon::TimestepNormInputs inputs{B, T, D, G, x, past, position, weight, epsilon};
        const megalodon::TimestepNormBackwardCall call{inputs,    grad_y,      grad_present, grad_x,
                                                       grad_past, grad_weight, grad_bias,    workspace};
        return megalodon::launch_timestep_norm_backward(dtype, call, stream);
    });
}
