// Launches that the forward and the backward pass share.
#pragma once

#include <initializer_list>

#include "common/launch.h"
#include "operators/timestep_norm/normalise.cuh"

namespace megalodon::timestep_norm {

/// Whether kernels that walk columns may take packs: no pack spans two groups, and all of `tensors` are aligned.
template <typename Activation>
bool takes_packs(const TimestepNormInputs& in, std::initializer_list<const void*> tensors) {
    for (const void* tensor : tensors) {
        if (!has_aligned_packs(static_cast<const Activation*>(tensor), in.D / in.G)) return false;
    }
    return true;
}

template <int kSize>
int64_t num_column_blocks(const TimestepNormInputs& in, int64_t chunk_tokens) {
    return in.B * ceil_div(in.T, chunk_tokens) * ceil_div(in.D, kSize * kColumnThreads);
}

/// The first launch of all. B and T at least 1. MGD_UNSUPPORTED when D or a grid of this launch or a later one does not
/// fit 31 bits.
template <typename Activation, bool kHasGradient>
int launch_token_sums(const TimestepNormInputs& in, const void* grad_y, Normaliser* tokens, GradientSums* sums,
                      cudaStream_t stream) {
    constexpr int kBlockThreads = 128;
    if (in.B * in.T > kMaxBlocks || in.B * in.G > kMaxBlocks || in.D > INT32_MAX / 2) return MGD_UNSUPPORTED;
    if (num_column_blocks<1>(in, kNormaliseTokens) > kMaxBlocks) return MGD_UNSUPPORTED;
    const int64_t packs = ceil_div(in.D / in.G, kPackSize<Activation>);
    int lanes = 1;
    while (lanes < kWarpSize && lanes < packs) {
        lanes *= 2;
    }
    const auto kernel = token_sums_kernel<Activation, kHasGradient>;
    return status_of(launch_kernel(kernel, in.B * in.T, kBlockThreads, stream, in, grad_y, lanes, tokens, sums));
}

}  // namespace megalodon::timestep_norm
