// The C interface: checks every argument, then hands over to the launchers. The TensorRT plugins come through here too.
#include <cmath>

#include "c_api/checks.h"
#include "common/launch.h"
#include "megalodon/megalodon.h"
#include "operators/complex_ema/launch.h"
#include "operators/timestep_norm/launch.h"

using megalodon::is_activation;
using megalodon::none_negative;
using megalodon::none_null;
using megalodon::without_exceptions;

int32_t mgd_abi_version(void) {
    return MGD_ABI_VERSION;
}

const char* mgd_status_string(int status) {
    switch (status) {
        case MGD_OK:
            return "success";
        case MGD_INVALID_ARGUMENT:
            return "invalid argument: a size, type or pointer that no call can have";
        case MGD_UNSUPPORTED:
            return "unsupported: more modes, wider heads or more rows than the kernels take";
        case MGD_INTERNAL_ERROR:
            return "internal error in libmegalodon";
        default:
            return status > MGD_CUDA_ERROR ? megalodon::cuda_error_string(status - MGD_CUDA_ERROR) : "unknown status";
    }
}

int mgd_complex_ema(int dtype, int64_t B, int64_t T, int64_t D, int64_t N, const void* x, const float* past,
                    const int64_t* position, const float* p, const float* q, const float* gamma, const float* omega,
                    void* y, float* present, void* stream) {
    return without_exceptions([&]() -> int {
        if (!is_activation(dtype) || !none_negative(B, T, D) || N < 1) return MGD_INVALID_ARGUMENT;
        if (B == 0 || D == 0) return MGD_OK;
        if (!none_null(past, position, p, q, gamma, omega, present)) return MGD_INVALID_ARGUMENT;
        if (T > 0 && (!none_null(x, static_cast<const void*>(y)) || x == y)) return MGD_INVALID_ARGUMENT;
        if (past == present) return MGD_INVALID_ARGUMENT;
        if (N > MGD_MAX_MODES) return MGD_UNSUPPORTED;
        const megalodon::ComplexEmaCall call{B, T, D, N, x, past, position, p, q, gamma, omega, y, present};
        return megalodon::launch_complex_ema(dtype, call, stream);
    });
}

size_t mgd_timestep_norm_workspace_bytes(int64_t B, int64_t T, int64_t G) {
    return none_negative(B, T, G) ? megalodon::timestep_norm_workspace_bytes(B, T, G) : 0;
}

int mgd_timestep_norm(int dtype, int64_t B, int64_t T, int64_t D, int64_t G, const void* x, const float* past,
                      const int64_t* position, const float* weight, const float* bias, float epsilon, void* y,
                      float* present, void* workspace, size_t workspace_bytes, void* stream) {
    return without_exceptions([&]() -> int {
        if (!is_activation(dtype) || !none_negative(B, T, D) || G < 1 || D % G != 0) return MGD_INVALID_ARGUMENT;
        if (!std::isfinite(epsilon) || epsilon <= 0) return MGD_INVALID_ARGUMENT;
        if (B == 0 || D == 0) return MGD_OK;
        if (!none_null(past, position, weight, bias, present) || past == present) return MGD_INVALID_ARGUMENT;
        if (T > 0 && (!none_null(x, static_cast<const void*>(y)) || x == y)) return MGD_INVALID_ARGUMENT;
        const size_t needed_bytes = megalodon::timestep_norm_workspace_bytes(B, T, G);
        if (workspace_bytes < needed_bytes || (needed_bytes > 0 && workspace == nullptr)) return MGD_INVALID_ARGUMENT;
        const megalodon::TimestepNormCall call{B,      T,    D,       G, x,       past,     position,
                                               weight, bias, epsilon, y, present, workspace};
        return megalodon::launch_timestep_norm(dtype, call, stream);
    });
}
