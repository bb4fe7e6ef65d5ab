// From the moments of single tokens to those of all tokens so far, in float64.
//
// With n tokens before the call, m and v the tokens' moments and c the past mean (0 where n = 0):
//     mean_t = c + sum_{i<=t} (m_i - c) / (n + t + 1)
//     var_t  = (n var_past + sum_{i<=t} (v_i + (m_i - mean_{i-1})^2 (n + i) / (n + i + 1))) / (n + t + 1)
// which is the update of the specification summed up: two prefix sums and no cancelling squares.
#pragma once

#include "operators/timestep_norm/token_sums.cuh"

namespace megalodon::timestep_norm {

constexpr int kScanThreads = 256;
constexpr int kThreadTokens = 4;  // neighbouring tokens of one thread
constexpr int kTileTokens = kScanThreads * kThreadTokens;
constexpr int kScanWarps = kScanThreads / kWarpSize;

/// Replaces each value by the sum of `carry` and of all lower threads' values, and adds the block's total to `carry`.
/// `totals` is shared memory, [kScanWarps, kCount]. Every thread of the block must call.
template <int kCount>
__device__ inline void scan_over_block(double (&values)[kCount], double (&carry)[kCount], double* totals) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        double sum = values[i];
        for (int distance = 1; distance < kWarpSize; distance *= 2) {
            const double lower = __shfl_up_sync(kWholeWarp, sum, distance);
            if (lane >= distance) sum += lower;
        }
        if (lane == kWarpSize - 1) totals[warp * kCount + i] = sum;
        const double lower = __shfl_up_sync(kWholeWarp, sum, 1);
        values[i] = lane == 0 ? 0.0 : lower;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        for (int other = 0; other < kScanWarps; ++other) {
            if (other == warp) values[i] += carry[i];  // here the carry holds the lower warps as well
            carry[i] += totals[other * kCount + i];
        }
    }
    __syncthreads();  // before the next call writes its totals
}

/// Statistics of one group of one row before a tile.
struct Running {
    Moments past;                                       // before the call; its mean is c
    double mean_sum[1] = {0.0}, spread_sum[1] = {0.0};  // of m - c, and of the terms of var

    /// Of all tokens up to the call's first `num_tokens`, whose sum of m - c is `sum`; c where there are none.
    __device__ double mean_after(double sum, double num_tokens) const {
        const double n = past.count + num_tokens;
        return n == 0 ? past.mean : past.mean + sum / n;
    }
};

/// Takes one tile, tokens first .. first + kTileTokens, of which those below `length` count, and calls
/// use(t, token, moments) for each token of this thread that does: its own moments, and those of all tokens up to it.
template <typename Use>
__device__ inline void take_prefix_tile(Running& running, const Normaliser* tokens, int64_t first, int64_t length,
                                        double* totals, Use use) {
    const int64_t start = first + static_cast<int64_t>(threadIdx.x) * kThreadTokens;
    Normaliser token[kThreadTokens] = {};
    double sum[1] = {0.0};
#pragma unroll
    for (int k = 0; k < kThreadTokens; ++k) {
        if (start + k >= length) continue;
        token[k] = tokens[start + k];
        sum[0] += mean_of(token[k]) - running.past.mean;
    }
    scan_over_block(sum, running.mean_sum, totals);

    double means[kThreadTokens] = {}, terms[kThreadTokens] = {}, spread[1] = {0.0};
    double mean = running.mean_after(sum[0], static_cast<double>(start));
#pragma unroll
    for (int k = 0; k < kThreadTokens; ++k) {
        if (start + k >= length) continue;
        const double before = running.past.count + static_cast<double>(start + k), own = mean_of(token[k]);
        const double delta = own - mean;
        terms[k] = token[k].scale + delta * delta * (before / (before + 1.0));  // the packed token's scale is its var
        spread[0] += terms[k];
        sum[0] += own - running.past.mean;
        mean = running.mean_after(sum[0], static_cast<double>(start + k + 1));
        means[k] = mean;
    }
    scan_over_block(spread, running.spread_sum, totals);
#pragma unroll
    for (int k = 0; k < kThreadTokens; ++k) {
        if (start + k >= length) continue;
        spread[0] += terms[k];
        const double n = running.past.count + static_cast<double>(start + k + 1);
        use(start + k, token[k], Moments{n, means[k], running.past.spread + spread[0]});
    }
}

}  // namespace megalodon::timestep_norm
