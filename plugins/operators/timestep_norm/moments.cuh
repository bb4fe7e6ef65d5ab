// The running mean and variance of a stream's group, in float64, and how two stretches of tokens join.
#pragma once

#include "common/device.cuh"
#include "megalodon/state_layout.h"
#include "operators/timestep_norm/launch.h"

namespace megalodon::timestep_norm {

/// A stretch of tokens of one group. `spread` is count times the population variance. An empty one is all zero.
struct Moments {
    double count, mean, spread;
};

/// Moments of stretch `a` followed by stretch `b`, which is not empty. With b one token this is the update of the
/// specification: mean' = mean + delta / n', n' var' = n var + v + delta^2 n / n'.
__device__ inline Moments join(const Moments& a, const Moments& b) {
    const double count = a.count + b.count;
    const double delta = b.mean - a.mean;
    const double share = b.count / count;
    return {count, a.mean + delta * share, a.spread + b.spread + delta * delta * a.count * share};
}

__device__ inline float high_part(double value) {
    return static_cast<float>(value);
}
__device__ inline float low_part(double value) {
    return static_cast<float>(value - high_part(value));
}

/// State of group `g` of row `row` before the call; a row at position 0 is empty whatever its past holds.
__device__ inline Moments load_past(const TimestepNormInputs& in, int64_t row, int64_t g) {
    const int64_t count = in.position[row];
    if (count == 0) return {0, 0, 0};
    const float* past = in.past + (row * in.G + g) * kNormParts;
    const double mean = static_cast<double>(past[kMeanHi]) + past[kMeanLo];
    const double var = static_cast<double>(past[kVarHi]) + past[kVarLo];
    return {static_cast<double>(count), mean, var * static_cast<double>(count)};
}

__device__ inline void store_present(const TimestepNormCall& call, int64_t row, int64_t g, const Moments& moments) {
    float* present = call.present + (row * call.in.G + g) * kNormParts;
    const double var = moments.count == 0 ? 0.0 : moments.spread / moments.count;
    present[kMeanHi] = high_part(moments.mean);
    present[kMeanLo] = low_part(moments.mean);
    present[kVarHi] = high_part(var);
    present[kVarLo] = low_part(var);
}

/// Moments of one token's group `x_s`, `size` scalars, computed by a whole warp; every lane gets them. Summing
/// distances from the first scalar keeps float32 exact enough where the mean is far from zero.
template <typename Activation>
__device__ inline Moments token_moments(const Activation* x_s, int64_t size, int lane) {
    const float pivot = to_float(x_s[0]);
    float sum = 0.0f;
    for (int64_t i = lane; i < size; i += kWarpSize) {
        sum += to_float(x_s[i]) - pivot;
    }
    const float shift = sum_over_lanes<kWarpSize>(sum) / static_cast<float>(size);
    float squares = 0.0f;
    for (int64_t i = lane; i < size; i += kWarpSize) {
        const float distance = to_float(x_s[i]) - pivot - shift;
        squares += distance * distance;
    }
    const float var = sum_over_lanes<kWarpSize>(squares) / static_cast<float>(size);
    return {1.0, static_cast<double>(pivot) + shift, var};
}

/// What normalises one token's group, in float32: the mean in two parts, and 1 / sqrt(var + epsilon).
struct alignas(16) Normaliser {
    float mean_hi, mean_lo, scale, unused;

    __device__ float apply(float x, float weight, float bias) const {
        return (x - mean_hi - mean_lo) * scale * weight + bias;
    }
};

__device__ inline Normaliser normaliser(const Moments& moments, float epsilon) {
    const double var = moments.spread / moments.count;
    const float scale = 1.0f / sqrtf(static_cast<float>(var + static_cast<double>(epsilon)));
    return {high_part(moments.mean), low_part(moments.mean), scale, 0.0f};
}

/// Tokens of row `row` that count.
__device__ inline int64_t length_of(const TimestepNormCall& call, int64_t row) {
    if (call.lengths == nullptr) return call.in.T;
    const int64_t length = call.lengths[row];
    return length < 0 ? 0 : smaller(length, call.in.T);
}

}  // namespace megalodon::timestep_norm
