// Many tokens, last step: normalise every scalar. A thread keeps its channels' weight and bias over several tokens.
#pragma once

#include "operators/timestep_norm/token_sums.cuh"

namespace megalodon::timestep_norm {

constexpr int kColumnThreads = 128;

/// Where a thread works: kSize neighbouring channels of one group, a chunk of a row's tokens.
struct Column {
    int64_t row, first_token, num_tokens;
    int channel, group;
    bool is_inside;

    __device__ int64_t offset(const TimestepNormInputs& in, int64_t k) const {
        return (row * in.T + first_token + k) * in.D + channel;
    }
};

/// Blocks of kColumnThreads, channels first, then chunks of `chunk_tokens` tokens, then rows. kSize divides D / G.
template <int kSize>
__device__ inline Column column_of(const TimestepNormInputs& in, int chunk_tokens) {
    const unsigned num_channels = static_cast<unsigned>(in.D), group_size = static_cast<unsigned>(in.D / in.G);
    const unsigned blocks = (num_channels + kSize * kColumnThreads - 1) / (kSize * kColumnThreads);
    const unsigned chunks = static_cast<unsigned>((in.T + chunk_tokens - 1) / chunk_tokens);
    const unsigned chunk = blockIdx.x / blocks, channel = (blockIdx.x % blocks * kColumnThreads + threadIdx.x) * kSize;
    const int64_t first = static_cast<int64_t>(chunk % chunks) * chunk_tokens;
    return {chunk / chunks,
            first,
            smaller<int64_t>(in.T - first, chunk_tokens),
            static_cast<int>(channel),
            static_cast<int>(channel / group_size),
            channel < num_channels};
}

constexpr int kNormaliseTokens = 8;

template <typename Activation, int kSize>
__global__ void normalise_kernel(TimestepNormCall call) {
    using Pack = Packed<Activation, kSize>;
    const TimestepNormInputs& in = call.in;
    const Column column = column_of<kSize>(in, kNormaliseTokens);
    if (!column.is_inside) return;
    float weight[kSize], bias[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        weight[i] = in.weight[column.channel + i];
        bias[i] = call.bias[column.channel + i];
    }
    const Normaliser* norms = static_cast<const Normaliser*>(call.workspace) +
                              workspace_index(in, column.row, column.group, column.first_token);
    const int64_t length = length_of(call, column.row);
#pragma unroll 4
    for (int64_t k = 0; k < column.num_tokens; ++k) {
        const int64_t offset = column.offset(in, k);
        const Pack x = *reinterpret_cast<const Pack*>(static_cast<const Activation*>(in.x) + offset);
        const Normaliser norm = norms[k];
        Pack y;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            const float value = norm.apply(to_float(x.elements[i]), weight[i], bias[i]);
            y.elements[i] = from_float<Activation>(column.first_token + k < length ? value : 0.0f);
        }
        *reinterpret_cast<Pack*>(static_cast<Activation*>(call.y) + offset) = y;
    }
}

}  // namespace megalodon::timestep_norm
