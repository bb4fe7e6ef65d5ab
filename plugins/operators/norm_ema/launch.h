// TimestepNormComplexEMA's launcher: no CUDA and no framework types, so that any front door may include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "operators/complex_ema/launch.h"
#include "operators/timestep_norm/launch.h"

namespace megalodon {

/// The two calls; what ComplexEMA reads is what TimestepNorm writes.
struct NormEmaCall {
    TimestepNormCall norm;
    ComplexEmaCall ema;
};

/// Bytes of workspace, which the two calls use one after the other.
size_t norm_ema_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t G, int64_t N);

/// Enqueues one kernel for one token, else those of the two operators, and returns an mgd_status. The caller has
/// checked both calls as mgd_timestep_norm and mgd_complex_ema do.
int launch_norm_ema(const NormEmaCall& call, void* stream);

}  // namespace megalodon
