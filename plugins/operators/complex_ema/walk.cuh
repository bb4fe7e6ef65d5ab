// ComplexEMA of many tokens: a block walks the tokens of one row's channels, tile by tile, with the modes in registers.
// Where there are too few channels for the device, rows are cut into segments that are walked side by side.
#pragma once

#include "operators/complex_ema/few_tokens.cuh"
#include "operators/complex_ema/tile.cuh"

namespace megalodon::complex_ema {

constexpr int kGroup = 16;  // tokens whose outputs are added up over the lanes together: shuffles wait, once a group

/// How every row is cut: `num` segments of `tokens` tokens (the last may be shorter).
struct Segments {
    int64_t num, tokens;
    float* edges;  // [num - 1, B, D, N, 2]: the state after each segment but the last
};

template <typename Layout>
using WalkTile = Tile < Layout,
      Layout::kLanes<4 ? 32 : 64>;

/// Takes in a group of tokens, all of them when kIsWhole, else the first `count`. `x` and `y` are the thread's column.
template <typename Layout, bool kIsWhole>
__device__ inline void walk_group(FoldedMode (&modes)[Layout::kModes], const float* x, float* y, int count, int lane,
                                  float omega) {
    constexpr int kStride = WalkTile<Layout>::kStride;
    float sums[kGroup];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
        sums[k] = 0.0f;
        if (!kIsWhole && k >= count) continue;
        const float u = x[k * kStride];
#pragma unroll
        for (int i = 0; i < Layout::kModes; ++i) {
            modes[i].advance(u);
            sums[k] = modes[i].add_output(sums[k]);
        }
    }
    share_sums_over_lanes<Layout::kLanes, kGroup>(sums, lane);
    constexpr int kShare = Layout::kLanes < kGroup ? kGroup / Layout::kLanes : 1;
    constexpr int kSharers = Layout::kLanes < kGroup ? 1 : Layout::kLanes / kGroup;  // lanes with the same total
    if (lane % kSharers != 0) return;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        const int token = lane / kSharers * kShare + i;
        y[token * kStride] = fmaf(omega, x[token * kStride], sums[i]);
    }
}

template <typename Layout>
__device__ inline void walk_tile(FoldedMode (&modes)[Layout::kModes], const float* x, float* y, int count, int lane,
                                 float omega) {
    constexpr int kStride = WalkTile<Layout>::kStride;
    int first = 0;
    for (; first + kGroup <= count; first += kGroup) {
        walk_group<Layout, true>(modes, x + first * kStride, y + first * kStride, kGroup, lane, omega);
    }
    if (first < count) {
        walk_group<Layout, false>(modes, x + first * kStride, y + first * kStride, count - first, lane, omega);
    }
}

/// Zeros for tokens that do not count.
template <typename Tile>
__device__ inline void clear_outputs(const ComplexEmaCall& call, const Place& place, int64_t first, int64_t last) {
    const int64_t num_channels = smaller<int64_t>(call.in.D - place.first_channel, Tile::kChannels);
    const int64_t offset = (place.row * call.in.T + first) * call.in.D + place.first_channel;
    with_activation(call.in.dtype, [&](auto zero) {
        for (int64_t i = threadIdx.x; i < (last - first) * num_channels; i += Tile::kThreads) {
            static_cast<decltype(zero)*>(call.y)[offset + i / num_channels * call.in.D + i % num_channels] = zero;
        }
    });
}

/// One block for each channel block of each row of each segment. Without outputs only the states after the segments are
/// computed, each segment but the first starting at zero, and the last segment is left out.
template <typename Layout, bool kHasOutput>
__global__ void walk_kernel(ComplexEmaCall call, Segments segments) {
    using Tile = WalkTile<Layout>;
    MGD_SHARED(float, x_tile, Tile::kFloats);
    MGD_SHARED(float, y_tile, kHasOutput ? Tile::kFloats : 1);
    const ComplexEmaInputs& in = call.in;
    const int64_t blocks_per_segment = in.B * ((in.D + Layout::kChannels - 1) / Layout::kChannels);
    const int64_t segment = blockIdx.x / blocks_per_segment;
    const Place place = place_of<Layout>(in, blockIdx.x % blocks_per_segment);
    const ModeRange range = mode_range<Layout::kModes>(in, place.channel(), place.lane);
    const int64_t state_size = in.B * in.D * in.N * kComplexParts;

    Mode unfolded[Layout::kModes];
    load_coefficients(in, range, unfolded);
    if (segment == 0) load_past(in, place.row, range, unfolded);
    if (kHasOutput && segment > 0) {
        load_states(in, segments.edges + (segment - 1) * state_size, place.row, range, unfolded);
    }
    FoldedMode modes[Layout::kModes];
    fold(unfolded, modes);
    const float omega = place.channel() < in.D ? in.omega[place.channel()] : 0.0f;

    const int64_t length = length_of(call, place.row), start = segment * segments.tokens;
    const int64_t end = smaller(start + segments.tokens, length);
    TileTransfer<Tile> transfer(in, place);
    transfer.load(in.x, start, smaller<int64_t>(end - start, Tile::kTokens));
    for (int64_t first = start; first < end; first += Tile::kTokens) {
        const int count = static_cast<int>(smaller<int64_t>(end - first, Tile::kTokens));
        transfer.spread(x_tile);
        __syncthreads();
        const int64_t next = first + Tile::kTokens;  // on its way while this tile is computed
        transfer.load(in.x, next, smaller<int64_t>(end - next, Tile::kTokens));
        if (kHasOutput) {
            walk_tile<Layout>(modes, x_tile + place.column, y_tile + place.column, count, place.lane, omega);
        } else {
            advance_through(modes, x_tile + place.column, Tile::kStride, count);
        }
        __syncthreads();
        if (kHasOutput) transfer.store(call.y, first, count, y_tile);
    }

    Complex states[Layout::kModes];
#pragma unroll
    for (int i = 0; i < Layout::kModes; ++i) {
        states[i] = modes[i].h();
    }
    if (!kHasOutput) {
        store_complex(in, segments.edges + segment * state_size, place.row, range, states);
        return;
    }
    const bool holds_last_token = start < length && length <= start + segments.tokens;
    if (holds_last_token || (length == 0 && segment == 0)) store_complex(in, call.present, place.row, range, states);
    const int64_t first_unused = start < length ? length : start;
    clear_outputs<Tile>(call, place, first_unused, smaller(start + segments.tokens, in.T));
}

/// q to the power of `exponent`, by squaring in float64: in float32 it would be off by 1e-3 after 2,048 tokens.
__device__ inline Complex power(Complex q, int64_t exponent) {
    double re = 1.0, im = 0.0, square_re = q.re, square_im = q.im;
    for (; exponent > 0; exponent /= 2) {
        if (exponent % 2 == 1) {
            const double old = re;
            re = re * square_re - im * square_im;
            im = old * square_im + im * square_re;
        }
        const double old = square_re;
        square_re = square_re * square_re - square_im * square_im;
        square_im = 2.0 * old * square_im;
    }
    return {static_cast<float>(re), static_cast<float>(im)};
}

/// Turns what the segments add to the state, edges as walk_kernel left them, into the states themselves.
/// Grid: one thread for each mode of each channel of each row.
__global__ void join_segments_kernel(ComplexEmaCall call, Segments segments) {
    const int64_t modes = call.in.D * call.in.N, state_size = call.in.B * modes;
    const int64_t index = thread_in_grid();
    if (index >= state_size) return;
    const float* q = call.in.q + index % modes * kComplexParts;
    const Complex factor = power({q[kRe], q[kIm]}, segments.tokens);
    float* edge = segments.edges + index * kComplexParts;
    Complex state = {edge[kRe], edge[kIm]};
    for (int64_t segment = 1; segment < segments.num - 1; ++segment) {
        edge += state_size * kComplexParts;
        const Complex before = multiply(factor, state);
        state = {before.re + edge[kRe], before.im + edge[kIm]};
        edge[kRe] = state.re;
        edge[kIm] = state.im;
    }
}

}  // namespace megalodon::complex_ema
