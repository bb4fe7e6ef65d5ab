// TimestepNorm and ComplexEMA of one token in one kernel: what a decode step spends on them is launches.
#pragma once

#include "operators/complex_ema/mode.cuh"
#include "operators/norm_ema/launch.h"
#include "operators/timestep_norm/moments.cuh"

namespace megalodon::norm_ema {

/// Joins the token's moments of group `g` to the past, by a whole warp.
__device__ inline timestep_norm::Moments joined_moments(const NormEmaCall& call, int64_t row, int64_t g, int64_t size,
                                                        int lane) {
    const TimestepNormInputs& in = call.norm.in;
    timestep_norm::Moments moments = timestep_norm::load_past(in, row, g);
    with_activation(call.ema.in.dtype, [&](auto zero) {
        const auto* x_s = static_cast<const decltype(zero)*>(in.x) + row * in.D + g * size;
        moments = timestep_norm::join(moments, timestep_norm::token_moments(x_s, size, lane));
    });
    return moments;
}

/// The norm's output for one channel, rounded to the activations' type as ComplexEMA would read it.
__device__ inline float normalised(const NormEmaCall& call, int64_t row, int64_t channel,
                                   const timestep_norm::Normaliser& norm, bool is_writer) {
    const TimestepNormInputs& in = call.norm.in;
    const int64_t index = row * in.D + channel;
    float u = 0.0f;
    with_activation(call.ema.in.dtype, [&](auto zero) {
        using Activation = decltype(zero);
        const float x = to_float(static_cast<const Activation*>(in.x)[index]);
        const auto rounded = from_float<Activation>(norm.apply(x, in.weight[channel], call.norm.bias[channel]));
        if (is_writer) static_cast<Activation*>(call.norm.y)[index] = rounded;
        u = to_float(rounded);
    });
    return u;
}

/// Grid: a block for each kChannels channels of each row. Its warps take the groups in which these channels lie, and
/// with them scalars of channels of other blocks; the block of a group's first channel writes the group's state.
template <typename Layout>
__global__ void __launch_bounds__(Layout::kThreads) step_kernel(NormEmaCall call) {
    constexpr int kWarps = Layout::kThreads / kWarpSize;
    MGD_SHARED(timestep_norm::Normaliser, norms, Layout::kChannels);
    const ComplexEmaInputs& in = call.ema.in;
    const int64_t num_tiles = (in.D + Layout::kChannels - 1) / Layout::kChannels, size = in.D / call.norm.in.G;
    const int64_t row = blockIdx.x / num_tiles, first_channel = blockIdx.x % num_tiles * Layout::kChannels;
    const int64_t end = smaller<int64_t>(first_channel + Layout::kChannels, in.D), first_group = first_channel / size;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % Layout::kLanes;
    const int64_t channel = first_channel + thread / Layout::kLanes;
    const int64_t own_norm = channel / size - first_group;  // here, while a division's call finds few registers in use

    // Read before the barrier, so that these latencies and those of the norm overlap.
    const complex_ema::ModeRange range = complex_ema::mode_range<Layout::kModes>(in, channel, lane);
    complex_ema::Mode modes[Layout::kModes];
    complex_ema::load_coefficients(in, range, modes);
    complex_ema::load_past(in, row, range, modes);

    for (int64_t g = first_group + thread / kWarpSize; g * size < end; g += kWarps) {  // the same for a warp
        const timestep_norm::Moments moments = joined_moments(call, row, g, size, thread % kWarpSize);
        if (thread % kWarpSize == 0) {
            norms[g - first_group] = timestep_norm::normaliser(moments, call.norm.in.epsilon);
            if (g * size >= first_channel) timestep_norm::store_present(call.norm, row, g, moments);
        }
    }
    __syncthreads();

    float u = 0.0f;
    if (channel < end) u = normalised(call, row, channel, norms[own_norm], lane == 0);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Layout::kModes; ++i) {
        sum += modes[i].step(u);
    }
    sum = sum_over_lanes<Layout::kLanes>(sum);
    if (channel < end && lane == 0) {
        with_activation(in.dtype, [&](auto zero) {
            using Activation = decltype(zero);
            const float y = fmaf(in.omega[channel], u, sum);
            static_cast<Activation*>(call.ema.y)[row * in.D + channel] = from_float<Activation>(y);
        });
    }
    complex_ema::Complex present[Layout::kModes];
#pragma unroll
    for (int i = 0; i < Layout::kModes; ++i) {
        present[i] = modes[i].h;
    }
    complex_ema::store_complex(in, call.ema.present, row, range, present);
}

}  // namespace megalodon::norm_ema
