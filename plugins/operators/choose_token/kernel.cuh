// choose_token: one block chooses the next token of one row. Weights are whole numbers, "masses", so that their sums do
// not depend on an order; filters are bisections over the mass.
#pragma once

#include "common/device.cuh"
#include "operators/choose_token/launch.h"

namespace megalodon::choose_token {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxShift = 48, kSumBits = 62;

/// The tokens that may be drawn: those with more mass than `border`, and the first `num_ties` of those with as much.
struct Kept {
    uint64_t border, num_ties, total;
};

struct Tail {
    uint64_t count, sum;
};

__device__ inline int lane_index() {
    return static_cast<int>(threadIdx.x) % kWarpSize;
}

__device__ inline int warp_index() {
    return static_cast<int>(threadIdx.x) / kWarpSize;
}

/// Sum over the block; every thread gets it. `slots`: kWarps values in shared memory.
__device__ inline uint64_t block_sum(uint64_t value, uint64_t* slots) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(kWholeWarp, value, distance);
    }
    __syncthreads();  // of the use before
    if (lane_index() == 0) slots[warp_index()] = value;
    __syncthreads();
    uint64_t sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
        sum += slots[warp];
    }
    return sum;
}

/// Largest number of the block; every thread gets it.
__device__ inline double block_max(double value, double* slots) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        value = fmax(value, __shfl_xor_sync(kWholeWarp, value, distance));
    }
    __syncthreads();
    if (lane_index() == 0) slots[warp_index()] = value;
    __syncthreads();
    double largest = slots[0];
    for (int warp = 1; warp < kWarps; ++warp) {
        largest = fmax(largest, slots[warp]);
    }
    return largest;
}

/// Sum over the threads before this one.
__device__ inline uint64_t sum_before(uint64_t value, uint64_t* slots) {
    uint64_t sum = value;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const uint64_t below = __shfl_up_sync(kWholeWarp, sum, distance);
        if (lane_index() >= distance) sum += below;
    }
    __syncthreads();
    if (lane_index() == kWarpSize - 1) slots[warp_index()] = sum;
    __syncthreads();
    for (int warp = 0; warp < warp_index(); ++warp) {
        sum += slots[warp];
    }
    return sum - value;
}

/// Number and sum of the masses that are at least `least`.
__device__ inline Tail tail_from(const uint64_t* mass_V, int64_t V, uint64_t least, uint64_t* slots) {
    Tail tail{0, 0};
    for (int64_t i = threadIdx.x; i < V; i += kThreads) {
        const uint64_t mass = mass_V[i];
        if (mass >= least) {
            ++tail.count;
            tail.sum += mass;
        }
    }
    const uint64_t count = block_sum(tail.count, slots);
    return {count, block_sum(tail.sum, slots)};
}

__device__ inline Kept keep_top_k(const uint64_t* mass_V, int64_t V, uint64_t k, uint64_t largest, uint64_t* slots) {
    uint64_t low = 0, high = largest + 1;  // at least k masses are low or more; fewer are high or more
    Tail above{0, 0};
    while (high - low > 1) {
        const uint64_t middle = low + (high - low) / 2;
        const Tail tail = tail_from(mass_V, V, middle, slots);
        if (tail.count >= k) {
            low = middle;
        } else {
            high = middle;
            above = tail;
        }
    }
    const uint64_t num_ties = k - above.count;
    return {low, num_ties, above.sum + num_ties * low};
}

__device__ inline Kept keep_top_p(const uint64_t* mass_V, int64_t V, double top_p, const Kept& kept, uint64_t largest,
                                  uint64_t* slots) {
    uint64_t wanted = static_cast<uint64_t>(ceil(top_p * static_cast<double>(kept.total)));
    if (wanted > kept.total) wanted = kept.total;
    uint64_t low = kept.border,
             high = largest + 1;  // the kept masses from low on reach `wanted`; those from high do not
    uint64_t above = 0;
    while (high - low > 1) {
        const uint64_t middle = low + (high - low) / 2;
        const uint64_t sum = tail_from(mass_V, V, middle, slots).sum;
        if (sum >= wanted) {
            low = middle;
        } else {
            high = middle;
            above = sum;
        }
    }
    // low > 0, since the masses from 1 on reach kept.total, which is at least `wanted`
    uint64_t num_ties = (wanted - above + low - 1) / low;
    if (low == kept.border && num_ties > kept.num_ties) num_ties = kept.num_ties;
    return {low, num_ties, above + num_ties * low};
}

__device__ inline Kept keep_min_p(const uint64_t* mass_V, int64_t V, double min_p, const Kept& kept, uint64_t largest,
                                  uint64_t* slots) {
    const uint64_t least = static_cast<uint64_t>(ceil(min_p * static_cast<double>(largest)));
    if (least <= kept.border) return kept;
    return {least - 1, 0, tail_from(mass_V, V, least, slots).sum};
}

/// Draws from what is kept, in token order: the first token at which the running sum exceeds the number drawn. Each
/// thread has a run of neighbouring tokens.
__device__ inline void draw(const uint64_t* mass_V, int64_t V, double uniform, const Kept& kept, int64_t* token,
                            uint64_t* slots) {
    uint64_t drawn = static_cast<uint64_t>(uniform * static_cast<double>(kept.total));
    if (drawn >= kept.total) drawn = kept.total - 1;
    const int64_t run = (V + kThreads - 1) / kThreads, first = run * threadIdx.x;
    const int64_t end = first + run < V ? first + run : V;
    uint64_t num_ties = 0;
    for (int64_t i = first; i < end; ++i) {
        if (mass_V[i] == kept.border) ++num_ties;
    }
    const uint64_t ties_before = sum_before(num_ties, slots);
    uint64_t ties = ties_before, sum = 0;
    for (int64_t i = first; i < end; ++i) {
        if (mass_V[i] > kept.border || (mass_V[i] == kept.border && ties++ < kept.num_ties)) sum += mass_V[i];
    }
    uint64_t reached = sum_before(sum, slots);
    if (drawn - reached >= sum) return;  // where drawn < reached, the difference is huge
    ties = ties_before;
    int64_t last = first - 1;
    while (reached <= drawn) {  // until `end` at the latest
        ++last;
        const uint64_t mass = mass_V[last];
        if (mass > kept.border || (mass == kept.border && ties++ < kept.num_ties)) reached += mass;
    }
    *token = last;
}

/// Writes the scores with the repetition penalty; a NaN becomes an infinity, with which nothing is chosen.
__device__ inline void penalise(const ChooseTokenCall& call, const mgd_choice& choice, double* score_V) {
    const float* logits_V = call.logits + blockIdx.x * call.V;
    for (int64_t i = threadIdx.x; i < call.V; i += kThreads) {
        const double score = logits_V[i];
        score_V[i] = score == score ? score : HUGE_VAL;
    }
    __syncthreads();
    const int64_t* recent = call.recent + blockIdx.x * call.max_recent;
    for (int64_t i = threadIdx.x; i < choice.num_recent; i += kThreads) {
        const double score = score_V[recent[i]], penalty = choice.repetition_penalty;
        score_V[recent[i]] = score > 0 ? score / penalty : score * penalty;
    }
    __syncthreads();
}

/// Grid: a block for each row.
__global__ void choose_token_kernel(ChooseTokenCall call) {
    MGD_SHARED(uint64_t, slots, kWarps);
    MGD_SHARED(double, numbers, kWarps);
    const mgd_choice choice = call.choices[blockIdx.x];
    if (choice.is_wanted == 0) return;
    int64_t* token = call.tokens + blockIdx.x;
    double* score_V = static_cast<double*>(call.workspace) + blockIdx.x * call.V;
    penalise(call, choice, score_V);

    double largest = -HUGE_VAL;
    for (int64_t i = threadIdx.x; i < call.V; i += kThreads) {
        largest = fmax(largest, score_V[i]);
    }
    largest = block_max(largest, numbers);
    if (largest == HUGE_VAL || largest == -HUGE_VAL) {
        if (threadIdx.x == 0) *token = -1;
        return;
    }
    if (choice.temperature == 0.0) {  // the first of the largest
        double best = -HUGE_VAL;
        for (int64_t i = threadIdx.x; i < call.V; i += kThreads) {
            if (score_V[i] == largest) best = fmax(best, -static_cast<double>(i));
        }
        best = block_max(best, numbers);
        if (threadIdx.x == 0) *token = static_cast<int64_t>(-best);
        return;
    }
    int shift = kSumBits;
    for (int64_t size = 1; size < call.V; size *= 2) {
        --shift;
    }
    const uint64_t one = 1ull << (shift < kMaxShift ? shift : kMaxShift);
    uint64_t* mass_V = reinterpret_cast<uint64_t*>(score_V);
    for (int64_t i = threadIdx.x; i < call.V; i += kThreads) {
        const double weight = exp((score_V[i] - largest) / choice.temperature);
        mass_V[i] = static_cast<uint64_t>(weight * static_cast<double>(one) + 0.5);
    }
    // No barrier: `tail_from` reads what its own thread has written, and then waits for all.
    Kept kept{0, 0, tail_from(mass_V, call.V, 0, slots).sum};
    if (choice.top_k > 0 && choice.top_k < call.V) {
        kept = keep_top_k(mass_V, call.V, static_cast<uint64_t>(choice.top_k), one, slots);
    }
    if (choice.top_p < 1.0) kept = keep_top_p(mass_V, call.V, choice.top_p, kept, one, slots);
    if (choice.min_p > 0.0) kept = keep_min_p(mass_V, call.V, choice.min_p, kept, one, slots);
    draw(mass_V, call.V, choice.uniform, kept, token, slots);
}

}  // namespace megalodon::choose_token
