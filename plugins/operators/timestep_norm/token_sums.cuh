// Many tokens, first step: what one token adds to its groups' sums. x (and, for gradients, grad_y) is read once.
#pragma once

#include "common/pack.cuh"
#include "operators/timestep_norm/moments.cuh"

namespace megalodon::timestep_norm {

/// A token's moments on their way to the prefix: (mean hi, mean lo, var), replaced in place by the normaliser.
__device__ inline Normaliser pack_token(double mean, float var) {
    return {high_part(mean), low_part(mean), var, 0.0f};
}

__device__ inline double mean_of(const Normaliser& packed) {
    return static_cast<double>(packed.mean_hi) + packed.mean_lo;
}

/// A token's sums over a group of grad weight, and of grad weight (x - token mean).
struct GradientSums {
    float grad, grad_x;
};

/// Both lie as [B, G, T] in the workspace: neighbours in time are neighbours in memory.
__device__ inline int64_t workspace_index(const TimestepNormInputs& in, int64_t row, int64_t g, int64_t t) {
    return (row * in.G + g) * in.T + t;
}

/// Moments of some scalars, relative to the group's first one: a large mean then costs no digits.
struct PartialMoments {
    float count, mean, spread;
};

/// One of the two may be empty.
__device__ inline PartialMoments join(const PartialMoments& a, const PartialMoments& b) {
    const float count = a.count + b.count, delta = b.mean - a.mean, share = b.count / count;
    return {count, fmaf(delta, share, a.mean), a.spread + b.spread + delta * delta * a.count * share};
}

template <typename Activation>
__device__ inline PartialMoments pack_moments(const Pack<Activation>& pack, int64_t available, float pivot) {
    constexpr int kSize = kPackSize<Activation>;
    const float count = available < kSize ? static_cast<float>(available) : static_cast<float>(kSize);
    float sum = 0.0f, spread = 0.0f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        if (i < available) sum += to_float(pack.elements[i]) - pivot;
    }
    const float mean = sum / count;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        const float distance = to_float(pack.elements[i]) - pivot - mean;
        if (i < available) spread = fmaf(distance, distance, spread);
    }
    return {count, mean, spread};
}

/// What one lane knows of one group of one token.
struct GroupSums {
    PartialMoments moments = {0.0f, 0.0f, 0.0f};
    float grad = 0.0f, grad_x = 0.0f;  // of grad weight, and of grad weight (x - pivot)

    /// Joins the sums of `lanes` neighbouring lanes, a power of two; the first of them has the result. All lanes call.
    template <bool kHasGradient>
    __device__ void join_lanes(int lanes) {
        for (int distance = lanes / 2; distance > 0; distance /= 2) {
            const PartialMoments other = {__shfl_xor_sync(kWholeWarp, moments.count, distance),
                                          __shfl_xor_sync(kWholeWarp, moments.mean, distance),
                                          __shfl_xor_sync(kWholeWarp, moments.spread, distance)};
            moments = timestep_norm::join(moments, other);
            if constexpr (kHasGradient) {
                grad += __shfl_xor_sync(kWholeWarp, grad, distance);
                grad_x += __shfl_xor_sync(kWholeWarp, grad_x, distance);
            }
        }
    }
};

/// Grid: one block for each token of each row. `lanes` neighbouring lanes, a power of two, take a group together.
/// `gradient_sums` and `grad_y` are null unless kHasGradient.
template <typename Activation, bool kHasGradient>
__global__ void token_sums_kernel(TimestepNormInputs in, const void* grad_y, int lanes, Normaliser* moments,
                                  GradientSums* gradient_sums) {
    constexpr int kSize = kPackSize<Activation>;
    const unsigned num_tokens = static_cast<unsigned>(in.T);
    const int64_t row = blockIdx.x / num_tokens, t = blockIdx.x % num_tokens;
    const int num_groups = static_cast<int>(in.G), size = static_cast<int>(in.D / in.G);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes;
    const int groups_at_once = static_cast<int>(blockDim.x) / lanes;
    const Activation* x_D = static_cast<const Activation*>(in.x) + blockIdx.x * in.D;
    const Activation* grad_D = kHasGradient ? static_cast<const Activation*>(grad_y) + blockIdx.x * in.D : nullptr;
    const bool is_aligned = has_aligned_packs(x_D, size);
    const bool is_grad_aligned = has_aligned_packs(grad_D, size);

    for (int first_group = 0; first_group < num_groups; first_group += groups_at_once) {
        const int g = first_group + thread / lanes;
        const int64_t offset = static_cast<int64_t>(g) * size;
        const bool is_inside = g < num_groups;  // the others compute as well: every lane must reach the shuffles
        const float pivot = is_inside ? to_float(x_D[offset]) : 0.0f;
        GroupSums sums;
        for (int i = lane * kSize; is_inside && i < size; i += lanes * kSize) {
            const Pack<Activation> pack = load_pack(x_D + offset + i, size - i, is_aligned);
            sums.moments = join(sums.moments, pack_moments(pack, size - i, pivot));
            if (!kHasGradient) continue;
            const Pack<Activation> grads = load_pack(grad_D + offset + i, size - i, is_grad_aligned);
#pragma unroll
            for (int k = 0; k < kSize; ++k) {
                if (i + k >= size) continue;
                const float scaled = to_float(grads.elements[k]) * in.weight[offset + i + k];
                sums.grad += scaled;
                sums.grad_x = fmaf(scaled, to_float(pack.elements[k]) - pivot, sums.grad_x);
            }
        }
        sums.template join_lanes<kHasGradient>(lanes);
        if (!is_inside || lane != 0) continue;
        const PartialMoments& group = sums.moments;
        const int64_t index = workspace_index(in, row, g, t);
        moments[index] = pack_token(static_cast<double>(pivot) + group.mean, group.spread / group.count);
        if (kHasGradient) gradient_sums[index] = {sums.grad, fmaf(-group.mean, sums.grad, sums.grad_x)};
    }
}

}  // namespace megalodon::timestep_norm
