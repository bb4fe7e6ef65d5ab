// TimestepNorm. A few tokens: one kernel, a warp walks a group's tokens. Many tokens: three kernels, moments of every
// token, prefix over the tokens of a group, normalisation of every scalar.
#pragma once

#include "operators/timestep_norm/moments.cuh"

namespace megalodon::timestep_norm {

/// Grid: one warp for each group of each row.
template <typename Activation>
__global__ void few_tokens_kernel(TimestepNormCall call) {
    const int64_t row_group = thread_in_grid() / kWarpSize;
    if (row_group >= call.B * call.G) return;  // a whole warp leaves
    const int64_t row = row_group / call.G, g = row_group % call.G, size = call.D / call.G;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const float* weight = call.weight + g * size;
    const float* bias = call.bias + g * size;

    Moments moments = load_past(call, row, g);
    for (int64_t t = 0; t < call.T; ++t) {
        const int64_t offset = (row * call.T + t) * call.D + g * size;
        const Activation* x_s = static_cast<const Activation*>(call.x) + offset;
        Activation* y_s = static_cast<Activation*>(call.y) + offset;
        moments = join(moments, token_moments(x_s, size, lane));
        const Normaliser norm = normaliser(moments, call.epsilon);
        for (int64_t i = lane; i < size; i += kWarpSize) {
            y_s[i] = from_float<Activation>(norm.apply(to_float(x_s[i]), weight[i], bias[i]));
        }
    }
    if (lane == 0) store_present(call, row, g, moments);
}

/// The workspace holds one entry for each group of each token, [B, G, T]: neighbours in time are neighbours in memory.
__device__ inline int64_t workspace_index(const TimestepNormCall& call, int64_t row, int64_t g, int64_t t) {
    return (row * call.G + g) * call.T + t;
}

/// A token's moments on their way to the prefix: (mean hi, mean lo, var), replaced in place by the normaliser.
__device__ inline Normaliser pack_token(const Moments& token) {
    return {high_part(token.mean), low_part(token.mean), static_cast<float>(token.spread), 0.0f};
}

__device__ inline Moments unpack_token(const Normaliser& packed) {
    return {1.0, static_cast<double>(packed.mean_hi) + packed.mean_lo, packed.scale};
}

/// Grid: one block for each token of each row; its warps share the groups.
template <typename Activation>
__global__ void token_moments_kernel(TimestepNormCall call) {
    const int64_t row = blockIdx.x / call.T, t = blockIdx.x % call.T, size = call.D / call.G;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const Activation* x_D = static_cast<const Activation*>(call.x) + blockIdx.x * call.D;
    Normaliser* workspace = static_cast<Normaliser*>(call.workspace);
    for (int64_t g = threadIdx.x / kWarpSize; g < call.G; g += blockDim.x / kWarpSize) {
        const Moments token = token_moments(x_D + g * size, size, lane);
        if (lane == 0) workspace[workspace_index(call, row, g, t)] = pack_token(token);
    }
}

__device__ inline Moments shuffle_up(const Moments& moments, int distance) {
    return {__shfl_up_sync(kWholeWarp, moments.count, distance), __shfl_up_sync(kWholeWarp, moments.mean, distance),
            __shfl_up_sync(kWholeWarp, moments.spread, distance)};
}

/// Joins every lane's moments with those of all lanes before it.
__device__ inline Moments prefix_in_warp(Moments moments, int lane) {
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const Moments before = shuffle_up(moments, distance);
        if (lane >= distance) moments = join(before, moments);
    }
    return moments;
}

/// Grid: one block of kThreads for each group of each row; it takes kThreads tokens at a time.
template <int kThreads>
__global__ void prefix_kernel(TimestepNormCall call) {
    constexpr int kWarps = kThreads / kWarpSize;
    MGD_SHARED(Moments, warp_totals, kWarps);
    MGD_SHARED(Moments, tile_total, 1);
    const int64_t row = blockIdx.x / call.G, g = blockIdx.x % call.G;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
    Normaliser* workspace_T = static_cast<Normaliser*>(call.workspace) + workspace_index(call, row, g, 0);

    Moments before_tile = load_past(call, row, g);
    for (int64_t first = 0; first < call.T; first += kThreads) {
        const int64_t t = first + thread;
        const Moments token = t < call.T ? unpack_token(workspace_T[t]) : Moments{0, 0, 0};
        Moments moments = prefix_in_warp(token, lane);
        if (lane == kWarpSize - 1) warp_totals[warp] = moments;
        __syncthreads();
        Moments before_warp = before_tile;
        for (int w = 0; w < warp; ++w) {
            before_warp = join(before_warp, warp_totals[w]);
        }
        moments = join(before_warp, moments);
        if (t < call.T) workspace_T[t] = normaliser(moments, call.epsilon);
        if (thread == kThreads - 1) tile_total[0] = moments;
        __syncthreads();
        before_tile = tile_total[0];
    }
    if (thread == 0) store_present(call, row, g, before_tile);
}

/// Grid: one block for each token of each row.
template <typename Activation>
__global__ void normalise_kernel(TimestepNormCall call) {
    const int64_t row = blockIdx.x / call.T, t = blockIdx.x % call.T;
    const int num_channels = static_cast<int>(call.D), size = num_channels / static_cast<int>(call.G);
    const Activation* x_D = static_cast<const Activation*>(call.x) + blockIdx.x * call.D;
    Activation* y_D = static_cast<Activation*>(call.y) + blockIdx.x * call.D;
    const Normaliser* workspace = static_cast<const Normaliser*>(call.workspace);
    for (int d = static_cast<int>(threadIdx.x); d < num_channels; d += static_cast<int>(blockDim.x)) {
        const Normaliser& norm = workspace[workspace_index(call, row, d / size, t)];
        y_D[d] = from_float<Activation>(norm.apply(to_float(x_D[d]), call.weight[d], call.bias[d]));
    }
}

}  // namespace megalodon::timestep_norm
