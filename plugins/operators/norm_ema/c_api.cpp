#include "operators/norm_ema/launch.h"

#include <cmath>

#include "c_api/checks.h"

size_t mgd_timestep_norm_complex_ema_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t G, int64_t N) {
    return megalodon::none_negative(B, T, D, G, N) ? megalodon::norm_ema_workspace_bytes(B, T, D, G, N) : 0;
}

int mgd_timestep_norm_complex_ema(int dtype, int64_t B, int64_t T, int64_t D, int64_t G, int64_t N, const void* x,
                                  const float* past_norm, const int64_t* position, const float* weight,
                                  const float* bias, float epsilon, const float* past_cema, const float* p,
                                  const float* q, const float* gamma, const float* omega, void* u, float* present_norm,
                                  void* y, float* present_cema, void* workspace, size_t workspace_bytes, void* stream) {
    using megalodon::none_null;
    return megalodon::without_exceptions([&]() -> int {
        if (!megalodon::is_activation(dtype) || !megalodon::none_negative(B, T, D)) return MGD_INVALID_ARGUMENT;
        if (G < 1 || D % G != 0 || N < 1 || !std::isfinite(epsilon) || epsilon <= 0) return MGD_INVALID_ARGUMENT;
        if (B == 0 || D == 0) return MGD_OK;
        if (!none_null(past_norm, position, weight, bias, past_cema, p, q, gamma, omega, present_norm, present_cema)) {
            return MGD_INVALID_ARGUMENT;
        }
        if (past_norm == present_norm || past_cema == present_cema) return MGD_INVALID_ARGUMENT;
        const void* outputs[] = {u, y};
        if (T > 0 && (!none_null(x, outputs[0], outputs[1]) || x == u || x == y || u == y)) return MGD_INVALID_ARGUMENT;
        if (N > MGD_MAX_MODES) return MGD_UNSUPPORTED;
        const size_t needed_bytes = megalodon::norm_ema_workspace_bytes(B, T, D, G, N);
        if (!megalodon::is_workspace(workspace, workspace_bytes, needed_bytes)) return MGD_INVALID_ARGUMENT;
        const megalodon::TimestepNormInputs norm{B, T, D, G, x, past_norm, position, weight, epsilon};
        const megalodon::ComplexEmaInputs ema{dtype, B, T, D, N, u, past_cema, position, p, q, gamma, omega};
        const megalodon::NormEmaCall call{{norm, bias, nullptr, u, present_norm, workspace},
                                          {ema, nullptr, y, present_cema, workspace, workspace_bytes}};
        return megalodon::launch_norm_ema(call, stream);
    });
}
