// ComplexEMA of a few tokens: decode. Bound by the state, which is read and written once.
#pragma once

#include "operators/complex_ema/mode.cuh"

namespace megalodon::complex_ema {

/// Tokens of row `row` that count.
__device__ inline int64_t length_of(const ComplexEmaCall& call, int64_t row) {
    if (call.lengths == nullptr) return call.in.T;
    const int64_t length = call.lengths[row];
    return length < 0 ? 0 : smaller(length, call.in.T);
}

/// Grid: B * D * kLanes threads, channels next to each other.
template <typename Layout>
__global__ void few_tokens_kernel(ComplexEmaCall call) {
    const ComplexEmaInputs& in = call.in;
    const int64_t row_channel = thread_in_grid() / Layout::kLanes;
    const bool is_inside = row_channel < in.B * in.D;  // the others compute as well: every lane must reach the shuffles
    const int64_t row = is_inside ? row_channel / in.D : 0, channel = is_inside ? row_channel % in.D : in.D;
    const int lane = static_cast<int>(threadIdx.x) % Layout::kLanes;

    const ModeRange range = mode_range<Layout::kModes>(in, channel, lane);
    Mode modes[Layout::kModes];
    load_coefficients(in, range, modes);
    load_past(in, row, range, modes);
    const float omega = is_inside ? in.omega[channel] : 0.0f;
    const int64_t length = length_of(call, row);

    for (int64_t t = 0; t < in.T; ++t) {
        const int64_t index = (row * in.T + t) * in.D + channel;
        const bool counts = is_inside && t < length;
        float u = 0.0f;
        with_activation(in.dtype, [&](auto zero) {
            if (counts) u = to_float(static_cast<const decltype(zero)*>(in.x)[index]);
        });
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < Layout::kModes; ++i) {
            if (counts) sum += modes[i].step(u);
        }
        sum = fmaf(omega, u, sum_over_lanes<Layout::kLanes>(sum));
        with_activation(in.dtype, [&](auto zero) {
            using Activation = decltype(zero);
            if (is_inside && lane == 0) static_cast<Activation*>(call.y)[index] = from_float<Activation>(sum);
        });
    }

    Complex present[Layout::kModes];
#pragma unroll
    for (int i = 0; i < Layout::kModes; ++i) {
        present[i] = modes[i].h;
    }
    store_complex(in, call.present, row, range, present);
}

}  // namespace megalodon::complex_ema
