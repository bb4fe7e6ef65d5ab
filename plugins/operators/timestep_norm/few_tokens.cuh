// TimestepNorm of a few tokens: a warp walks a group's tokens. Bound by its launch; no workspace.
#pragma once

#include "operators/timestep_norm/moments.cuh"

namespace megalodon::timestep_norm {

/// Grid: one warp for each group of each row.
template <typename Activation>
__global__ void few_tokens_kernel(TimestepNormCall call) {
    const TimestepNormInputs& in = call.in;
    const int64_t row_group = thread_in_grid() / kWarpSize;
    if (row_group >= in.B * in.G) return;  // a whole warp leaves
    const int64_t row = row_group / in.G, g = row_group % in.G, size = in.D / in.G;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const float* weight = in.weight + g * size;
    const float* bias = call.bias + g * size;
    const int64_t length = length_of(call, row);

    Moments moments = load_past(in, row, g);
    for (int64_t t = 0; t < in.T; ++t) {
        const int64_t offset = (row * in.T + t) * in.D + g * size;
        const Activation* x_s = static_cast<const Activation*>(in.x) + offset;
        Activation* y_s = static_cast<Activation*>(call.y) + offset;
        if (t < length) moments = join(moments, token_moments(x_s, size, lane));
        const Normaliser norm = normaliser(moments, in.epsilon);
        for (int64_t i = lane; i < size; i += kWarpSize) {
            const float y = t < length ? norm.apply(to_float(x_s[i]), weight[i], bias[i]) : 0.0f;
            y_s[i] = from_float<Activation>(y);
        }
    }
    if (lane == 0) store_present(call, row, g, moments);
}

}  // namespace megalodon::timestep_norm
