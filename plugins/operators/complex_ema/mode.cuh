// One complex mode of one channel: its state and coefficients, how they are loaded, and one step of the recurrence.
#pragma once

#include "common/pack.cuh"
#include "megalodon/megalodon.h"
#include "megalodon/state_layout.h"
#include "operators/complex_ema/launch.h"

namespace megalodon::complex_ema {

struct Complex {
    float re, im;
};

__device__ inline Complex multiply(Complex a, Complex b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

__device__ inline Complex sum_of(Complex a, Complex b) {
    return {a.re + b.re, a.im + b.im};
}

/// Which modes a thread keeps: kModes neighbouring ones of a channel, of which `num` exist.
struct ModeRange {
    int64_t index;  // of the first, in [D, N]
    int64_t num;
};

/// Lane `lane` of a channel's lanes. A channel beyond D has no modes.
template <int kModes>
__device__ inline ModeRange mode_range(const ComplexEmaInputs& in, int64_t channel, int lane) {
    const int64_t first = static_cast<int64_t>(lane) * kModes;
    return {channel * in.N + first, channel < in.D ? smaller<int64_t>(in.N - first, kModes) : 0};
}

/// The range's numbers of a tensor [D, N, 2], or of row `row` of one that is [B, D, N, 2]; zero where there is no mode.
template <int kModes>
__device__ inline void load_complex(const ComplexEmaInputs& in, const float* tensor, int64_t row, ModeRange range,
                                    Complex (&values)[kModes]) {
    float parts[kModes * kComplexParts];
    const int64_t index = row * in.D * in.N + range.index;
    load_floats(tensor + index * kComplexParts, range.num * kComplexParts,
                has_aligned_packs(tensor, in.N * kComplexParts), parts);
#pragma unroll
    for (int i = 0; i < kModes; ++i) {
        values[i] = {parts[i * kComplexParts + kRe], parts[i * kComplexParts + kIm]};
    }
}

template <int kModes>
__device__ inline void store_complex(const ComplexEmaInputs& in, float* tensor, int64_t row, ModeRange range,
                                     const Complex (&values)[kModes]) {
    float parts[kModes * kComplexParts];
#pragma unroll
    for (int i = 0; i < kModes; ++i) {
        parts[i * kComplexParts + kRe] = values[i].re;
        parts[i * kComplexParts + kIm] = values[i].im;
    }
    const int64_t index = row * in.D * in.N + range.index;
    store_floats(tensor + index * kComplexParts, parts, range.num * kComplexParts,
                 has_aligned_packs(tensor, in.N * kComplexParts));
}

/// State h and coefficients, as in the operator's signature.
struct Mode {
    Complex h, q, gamma;
    float p;

    /// Takes one token in; returns the mode's part of the output.
    __device__ float step(float u) {
        h = {fmaf(q.re, h.re, fmaf(-q.im, h.im, p * u)), fmaf(q.re, h.im, q.im * h.re)};
        return fmaf(gamma.re, h.re, -gamma.im * h.im);
    }
};

/// p folded away: g = h / p obeys g_t = q g_{t-1} + u_t, and gamma takes the p. One product less for each token.
/// |p| is raised to kSmallestScale: h is then off by less than 6e-20 times the sum of |u|, whatever p is.
struct FoldedMode {
    static constexpr float kSmallestScale = 0x1p-64f;

    Complex g, q, gamma;
    float scale;

    FoldedMode() = default;

    __device__ explicit FoldedMode(const Mode& mode) : q(mode.q) {
        scale = fabsf(mode.p) < kSmallestScale ? copysignf(kSmallestScale, mode.p) : mode.p;
        g = {mode.h.re / scale, mode.h.im / scale};
        gamma = {mode.gamma.re * scale, mode.gamma.im * scale};
    }

    __device__ Complex h() const { return {g.re * scale, g.im * scale}; }

    __device__ void advance(float u) { g = {fmaf(q.re, g.re, fmaf(-q.im, g.im, u)), fmaf(q.re, g.im, q.im * g.re)}; }

    /// Adds the mode's part of the output to `sum`.
    __device__ float add_output(float sum) const { return fmaf(gamma.re, g.re, fmaf(-gamma.im, g.im, sum)); }
};

template <int kModes>
__device__ inline void fold(const Mode (&modes)[kModes], FoldedMode (&folded)[kModes]) {
#pragma unroll
    for (int i = 0; i < kModes; ++i) {
        folded[i] = FoldedMode(modes[i]);
    }
}

/// Takes in `count` tokens, `stride` floats apart, without outputs.
template <int kModes>
__device__ inline void advance_through(FoldedMode (&modes)[kModes], const float* x, int stride, int count) {
#pragma unroll 4
    for (int k = 0; k < count; ++k) {
        const float u = x[k * stride];
#pragma unroll
        for (int i = 0; i < kModes; ++i) {
            modes[i].advance(u);
        }
    }
}

/// The range's modes with their states zero.
template <int kModes>
__device__ inline void load_coefficients(const ComplexEmaInputs& in, ModeRange range, Mode (&modes)[kModes]) {
    Complex q[kModes], gamma[kModes];
    float p[kModes];
    load_complex(in, in.q, 0, range, q);
    load_complex(in, in.gamma, 0, range, gamma);
    load_floats(in.p + range.index, range.num, has_aligned_packs(in.p, in.N), p);
#pragma unroll
    for (int i = 0; i < kModes; ++i) {
        modes[i] = {{0.0f, 0.0f}, q[i], gamma[i], p[i]};
    }
}

template <int kModes>
__device__ inline void load_states(const ComplexEmaInputs& in, const float* tensor, int64_t row, ModeRange range,
                                   Mode (&modes)[kModes]) {
    Complex h[kModes];
    load_complex(in, tensor, row, range, h);
#pragma unroll
    for (int i = 0; i < kModes; ++i) {
        modes[i].h = h[i];
    }
}

/// The state before the call. Selected, not multiplied: the past of a fresh row may hold NaN.
template <int kModes>
__device__ inline void load_past(const ComplexEmaInputs& in, int64_t row, ModeRange range, Mode (&modes)[kModes]) {
    if (in.position[row] != 0) load_states(in, in.past, row, range, modes);
}

/// How a channel's modes lie on the lanes of a warp. kLanes * kModes is at least N.
template <int kLanes_, int kModes_>
struct Layout {
    static constexpr int kLanes = kLanes_;  // neighbouring lanes share a channel
    static constexpr int kModes = kModes_;  // each keeps so many modes in registers
    // A block takes this many channels of one row.
    static constexpr int kChannels = kLanes == kWarpSize ? 8 : 32;
    static constexpr int kThreads = kChannels * kLanes;
};

/// Calls `launch` with the layout for N modes: the smallest one. Four modes are four independent chains of dependent
/// operations for each thread, enough to keep the arithmetic units of its scheduler busy with one warp.
template <typename Launch>
int with_layout(int64_t N, Launch launch) {
    if (N <= 4) return launch(Layout<1, 4>());
    if (N <= 8) return launch(Layout<2, 4>());
    if (N <= 16) return launch(Layout<4, 4>());
    if (N <= 32) return launch(Layout<8, 4>());
    static_assert(MGD_MAX_MODES == 32 * 8);
    return launch(Layout<32, 8>());
}

}  // namespace megalodon::complex_ema
