// ComplexEMA, sequential in time: kLanes neighbouring lanes share a channel, each keeps kModes of its modes in
// registers.
#pragma once

#include "common/device.cuh"
#include "megalodon/state_layout.h"
#include "operators/complex_ema/launch.h"

namespace megalodon::complex_ema {

constexpr int kTileTokens = 8;  // loaded together, so that their latencies overlap: a load does not wait for the state

struct Complex {
    float re, im;
};

__device__ inline Complex load_complex(const float* values, int64_t index) {
    return {values[index * kComplexParts + kRe], values[index * kComplexParts + kIm]};
}

__device__ inline void store_complex(float* values, int64_t index, Complex value) {
    values[index * kComplexParts + kRe] = value.re;
    values[index * kComplexParts + kIm] = value.im;
}

/// One mode of one channel of one row: its state h and its coefficients.
struct Mode {
    Complex h, q, gamma;
    float p;

    /// Takes one token in; returns the mode's part of the output.
    __device__ float step(float u) {
        const Complex previous = h;
        h.re = q.re * previous.re - q.im * previous.im + p * u;
        h.im = q.re * previous.im + q.im * previous.re;
        return gamma.re * h.re - gamma.im * h.im;
    }
};

/// All zero: a mode beyond N that adds nothing, so that N need not fill the lanes.
__device__ inline Mode zero_mode() {
    return {{0, 0}, {0, 0}, {0, 0}, 0};
}

__device__ inline Mode load_mode(const ComplexEmaCall& call, int64_t row, int64_t channel, int64_t n) {
    const int64_t index = channel * call.N + n;
    const bool fresh = call.position[row] == 0;  // selected, not multiplied: the past of a fresh row may hold NaN
    const Complex past = fresh ? Complex{0, 0} : load_complex(call.past, row * call.D * call.N + index);
    return {past, load_complex(call.q, index), load_complex(call.gamma, index), call.p[index]};
}

/// Grid: B * D * kLanes threads, channels next to each other, so that a warp's loads of x are neighbours.
template <typename Activation, int kLanes, int kModes>
__global__ void complex_ema_kernel(ComplexEmaCall call) {
    const int64_t num_channels = call.B * call.D;
    const int64_t row_channel = thread_in_grid() / kLanes;
    const bool is_inside =
        row_channel < num_channels;  // the others compute as well: every lane must reach the shuffles
    const int64_t row = (is_inside ? row_channel : num_channels - 1) / call.D;
    const int64_t channel = (is_inside ? row_channel : num_channels - 1) % call.D;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;

    Mode modes[kModes];
#pragma unroll
    for (int i = 0; i < kModes; ++i) {
        const int64_t n = i * kLanes + lane;
        modes[i] = n < call.N ? load_mode(call, row, channel, n) : zero_mode();
    }
    const float omega = call.omega[channel];
    const Activation* __restrict__ x = static_cast<const Activation*>(call.x) + row * call.T * call.D + channel;
    Activation* __restrict__ y = static_cast<Activation*>(call.y) + row * call.T * call.D + channel;

    for (int64_t first = 0; first < call.T; first += kTileTokens) {
        float u[kTileTokens];
#pragma unroll
        for (int k = 0; k < kTileTokens; ++k) {
            u[k] = first + k < call.T ? to_float(x[(first + k) * call.D]) : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < kTileTokens; ++k) {
            if (first + k >= call.T) break;  // the same for every thread
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kModes; ++i) {
                sum += modes[i].step(u[k]);
            }
            sum = sum_over_lanes<kLanes>(sum);
            if (is_inside && lane == 0) y[(first + k) * call.D] = from_float<Activation>(sum + omega * u[k]);
        }
    }

#pragma unroll
    for (int i = 0; i < kModes; ++i) {
        const int64_t n = i * kLanes + lane;
        if (is_inside && n < call.N) store_complex(call.present, row_channel * call.N + n, modes[i].h);
    }
}

}  // namespace megalodon::complex_ema
