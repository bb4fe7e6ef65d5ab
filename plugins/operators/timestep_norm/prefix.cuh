// Many tokens, second step: from the moments of single tokens to what normalises each.
#pragma once

#include "operators/timestep_norm/scan.cuh"

namespace megalodon::timestep_norm {

/// Grid: one block of kScanThreads for each group of each row. Replaces the tokens' moments by their normalisers.
__global__ void prefix_kernel(TimestepNormCall call) {
    MGD_SHARED(double, totals, kScanWarps);
    const TimestepNormInputs& in = call.in;
    const int64_t row = blockIdx.x / in.G, g = blockIdx.x % in.G, length = length_of(call, row);
    Normaliser* tokens = static_cast<Normaliser*>(call.workspace) + workspace_index(in, row, g, 0);
    Running running{load_past(in, row, g)};
    if (length == 0 && threadIdx.x == 0) store_present(call, row, g, running.past);
    for (int64_t first = 0; first < length; first += kTileTokens) {
        take_prefix_tile(running, tokens, first, length, totals,
                         [&](int64_t t, const Normaliser&, const Moments& moments) {
                             tokens[t] = normaliser(moments, in.epsilon);
                             if (t == length - 1) store_present(call, row, g, moments);
                         });
    }
}

}  // namespace megalodon::timestep_norm
