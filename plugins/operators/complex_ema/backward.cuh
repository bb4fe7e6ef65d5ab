// Gradients of ComplexEMA. A first walk keeps the state before every tile; a second one, from the last tile to the
// first, recomputes the states within a tile and takes the gradient of the state back through them.
#pragma once

#include "operators/complex_ema/tile.cuh"

namespace megalodon::complex_ema {

/// A tile is kStretches stretches of kStretch tokens; the states of one stretch are all in registers at once.
template <typename Layout>
struct BackwardShape {
    static constexpr int kStretch = Layout::kModes == 4 ? 8 : 4;
    static constexpr int kStretches = Layout::kModes == 4 && Layout::kLanes > 1 ? 4 : 2;
    static constexpr int kTokens = kStretch * kStretches;
    using Tile = complex_ema::Tile<Layout, kTokens>;
};

/// Gradients of the coefficients from one row each: rows are added up afterwards, so that sums need no atomics.
struct RowGradients {
    float* p;      // [B, D, N]
    float* q;      // [B, D, N, 2]
    float* gamma;  // [B, D, N, 2]
    float* omega;  // [B, D]
};

/// Gradients of one mode's coefficients, with p still folded away.
struct ModeGradients {
    Complex q, gamma;
    float p;

    __device__ void add(const ModeGradients& other) {
        q = sum_of(q, other.q);
        gamma = sum_of(gamma, other.gamma);
        p += other.p;
    }
};

/// Grid: one block for each channel block of each row. Keeps the folded state before every tile, [tiles, B, D, N, 2].
/// At least one token.
template <typename Layout>
__global__ void checkpoint_kernel(ComplexEmaInputs in, float* checkpoints) {
    using Tile = typename BackwardShape<Layout>::Tile;
    MGD_SHARED(float, x_tile, Tile::kFloats);
    const Place place = place_of<Layout>(in, blockIdx.x);
    const ModeRange range = mode_range<Layout::kModes>(in, place.channel(), place.lane);
    Mode unfolded[Layout::kModes];
    load_coefficients(in, range, unfolded);
    load_past(in, place.row, range, unfolded);
    FoldedMode modes[Layout::kModes];
    fold(unfolded, modes);

    TileTransfer<Tile> transfer(in, place);
    transfer.load(in.x, 0, smaller<int64_t>(in.T, Tile::kTokens));
    for (int64_t first = 0;; first += Tile::kTokens) {
        Complex states[Layout::kModes];
#pragma unroll
        for (int i = 0; i < Layout::kModes; ++i) {
            states[i] = modes[i].g;
        }
        store_complex(in, checkpoints, first / Tile::kTokens * in.B + place.row, range, states);
        const int64_t next = first + Tile::kTokens;
        if (next >= in.T) break;  // nobody asks for the state after the last tile
        transfer.spread(x_tile);
        __syncthreads();
        transfer.load(in.x, next, smaller<int64_t>(in.T - next, Tile::kTokens));
        advance_through(modes, x_tile + place.column, Tile::kStride, Tile::kTokens);
        __syncthreads();
    }
}

/// The backward walk of one thread: its modes of one channel, all in registers.
template <typename Layout>
class BackwardWalk {
 public:
    using Shape = BackwardShape<Layout>;
    static constexpr int kModes = Layout::kModes, kLanes = Layout::kLanes, kStride = Shape::Tile::kStride;

    /// `modes` without past; `grad_present` is the gradient of the state after the last token.
    __device__ BackwardWalk(const Mode (&modes)[kModes], const Complex (&grad_present)[kModes], float omega, int lane)
        : omega_(omega), lane_(lane) {
        fold(modes, modes_);
#pragma unroll
        for (int i = 0; i < kModes; ++i) {
            gamma_[i] = modes[i].gamma;
            p_[i] = modes[i].p;
            grad_state_[i] = grad_present[i];
            sums_[i] = {{0.0f, 0.0f}, {0.0f, 0.0f}, 0.0f};
        }
    }

    /// Goes back through the first `count` tokens of a tile, given the folded state before it. `starts` is memory of
    /// this thread alone, kStretches * kModes pairs that lie `Layout::kThreads` apart.
    __device__ void take_tile(const Complex (&state)[kModes], const float* x, const float* grad_y, float* grad_x,
                              int count, float2* starts) {
#pragma unroll
        for (int i = 0; i < kModes; ++i) {
            modes_[i].g = state[i];
            tile_sums_[i] = {{0.0f, 0.0f}, {0.0f, 0.0f}, 0.0f};
        }
        for (int stretch = 0; stretch < Shape::kStretches - 1; ++stretch) {
            keep_state(starts + stretch * kModes * Layout::kThreads);
            advance_through(modes_, x + stretch * Shape::kStretch * kStride, kStride, Shape::kStretch);
        }
        keep_state(starts + (Shape::kStretches - 1) * kModes * Layout::kThreads);
        for (int stretch = Shape::kStretches - 1; stretch >= 0; --stretch) {
            const int first = stretch * Shape::kStretch, offset = first * kStride;
            restore_state(starts + stretch * kModes * Layout::kThreads);
            take_stretch(x + offset, grad_y + offset, grad_x + offset, count - first);
        }
#pragma unroll
        for (int i = 0; i < kModes; ++i) {
            sums_[i].add(tile_sums_[i]);  // sums of sums: of 10^5 tokens one by one, float32 would lose two digits
        }
    }

    /// Gradient of the state before the tokens taken so far.
    __device__ Complex grad_state(int i) const { return grad_state_[i]; }

    __device__ void store_gradients(const ComplexEmaInputs& in, const RowGradients& rows, int64_t row,
                                    ModeRange range) const {
        Complex q[kModes], gamma[kModes];
        float p[kModes];
#pragma unroll
        for (int i = 0; i < kModes; ++i) {
            const float scale = modes_[i].scale;
            q[i] = {sums_[i].q.re * scale, sums_[i].q.im * scale};
            gamma[i] = {sums_[i].gamma.re * scale, sums_[i].gamma.im * scale};
            p[i] = sums_[i].p;
        }
        store_complex(in, rows.q, row, range, q);
        store_complex(in, rows.gamma, row, range, gamma);
        store_floats(rows.p + row * in.D * in.N + range.index, p, range.num, has_aligned_packs(rows.p, in.N));
    }

    /// Over all lanes of the channel; all must call.
    __device__ float grad_omega() const { return sum_over_lanes<kLanes>(grad_omega_); }

 private:
    __device__ void keep_state(float2* starts) const {
#pragma unroll
        for (int i = 0; i < kModes; ++i) {
            starts[i * Layout::kThreads] = {modes_[i].g.re, modes_[i].g.im};
        }
    }

    __device__ void restore_state(const float2* starts) {
#pragma unroll
        for (int i = 0; i < kModes; ++i) {
            const float2 start = starts[i * Layout::kThreads];
            modes_[i].g = {start.x, start.y};
        }
    }

    /// Goes back through the first `count` tokens of a stretch, from the state before it, which the modes hold.
    __device__ void take_stretch(const float* x, const float* grad_y, float* grad_x, int count) {
        Complex states[Shape::kStretch + 1][kModes];  // before each token, and after the last
#pragma unroll
        for (int i = 0; i < kModes; ++i) {
            states[0][i] = modes_[i].g;
        }
#pragma unroll
        for (int k = 0; k < Shape::kStretch; ++k) {
#pragma unroll
            for (int i = 0; i < kModes; ++i) {
                modes_[i].advance(x[k * kStride]);
                states[k + 1][i] = modes_[i].g;
            }
        }
        float sums[Shape::kStretch];
#pragma unroll
        for (int k = Shape::kStretch - 1; k >= 0; --k) {
            sums[k] = 0.0f;
            if (k < count) sums[k] = take_token(states[k], states[k + 1], x[k * kStride], grad_y[k * kStride]);
        }
        finish_stretch(sums, x, grad_y, grad_x);
    }

    /// Returns these modes' part of the gradient of the token `u`, from the states before and after it.
    __device__ float take_token(const Complex (&before)[kModes], const Complex (&after)[kModes], float u, float grad) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kModes; ++i) {
            const Complex q = modes_[i].q;
            const Complex own = {fmaf(gamma_[i].re, grad, grad_state_[i].re),
                                 fmaf(-gamma_[i].im, grad, grad_state_[i].im)};
            grad_state_[i] = {fmaf(q.re, own.re, q.im * own.im), fmaf(q.re, own.im, -q.im * own.re)};
            ModeGradients& sums = tile_sums_[i];
            sums.q.re = fmaf(before[i].re, own.re, fmaf(before[i].im, own.im, sums.q.re));
            sums.q.im = fmaf(before[i].re, own.im, fmaf(-before[i].im, own.re, sums.q.im));
            sums.gamma.re = fmaf(after[i].re, grad, sums.gamma.re);
            sums.gamma.im = fmaf(-after[i].im, grad, sums.gamma.im);
            sums.p = fmaf(u, own.re, sums.p);
            sum = fmaf(p_[i], own.re, sum);
        }
        return sum;
    }

    /// Adds up over the lanes what each mode says about the tokens' gradients, and writes them. x and grad_y of tokens
    /// that do not exist are zero in a tile.
    __device__ void finish_stretch(float (&sums)[Shape::kStretch], const float* x, const float* grad_y, float* grad_x) {
        constexpr int kStretch = Shape::kStretch;
        share_sums_over_lanes<kLanes, kStretch>(sums, lane_);
        constexpr int kShare = kLanes < kStretch ? kStretch / kLanes : 1;
        constexpr int kSharers = kLanes < kStretch ? 1 : kLanes / kStretch;  // lanes with the same total
        if (lane_ % kSharers != 0) return;
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            const int token = lane_ / kSharers * kShare + i;
            const float grad = grad_y[token * kStride];
            grad_x[token * kStride] = fmaf(omega_, grad, sums[i]);
            grad_omega_ = fmaf(x[token * kStride], grad, grad_omega_);
        }
    }

    FoldedMode modes_[kModes];
    Complex gamma_[kModes];  // p not folded in
    float p_[kModes];
    Complex grad_state_[kModes];  // of h, from all tokens taken so far and the present state
    ModeGradients tile_sums_[kModes], sums_[kModes];
    float omega_, grad_omega_ = 0.0f;
    int lane_;
};

/// Grid: one block for each channel block of each row.
template <typename Layout>
__global__ void backward_kernel(ComplexEmaBackwardCall call, const float* checkpoints, RowGradients rows) {
    using Shape = BackwardShape<Layout>;
    using Tile = typename Shape::Tile;
    constexpr int kModes = Layout::kModes;
    MGD_SHARED(float, x_tile, Tile::kFloats);
    MGD_SHARED(float, grad_y_tile, Tile::kFloats);
    MGD_SHARED(float, grad_x_tile, Tile::kFloats);
    MGD_SHARED(float2, starts, Shape::kStretches * kModes * Layout::kThreads);
    const ComplexEmaInputs& in = call.in;
    const Place place = place_of<Layout>(in, blockIdx.x);
    const ModeRange range = mode_range<kModes>(in, place.channel(), place.lane);
    const float omega = place.channel() < in.D ? in.omega[place.channel()] : 0.0f;
    Mode coefficients[kModes];
    Complex gradients[kModes];
    load_coefficients(in, range, coefficients);
    load_complex(in, call.grad_present, place.row, range, gradients);
    BackwardWalk<Layout> walk(coefficients, gradients, omega, place.lane);

    TileTransfer<Tile> x(in, place), grad_y(in, place);
    Complex state[kModes], next_state[kModes];
    const auto start_loading = [&](int64_t first) {
        const int64_t count = first < 0 ? 0 : smaller<int64_t>(in.T - first, Tile::kTokens);
        x.load(in.x, first, count);
        grad_y.load(call.grad_y, first, count);
        if (count > 0) load_complex(in, checkpoints, first / Tile::kTokens * in.B + place.row, range, next_state);
    };
    const int64_t num_tiles = (in.T + Tile::kTokens - 1) / Tile::kTokens;
    start_loading((num_tiles - 1) * Tile::kTokens);
    for (int64_t first = (num_tiles - 1) * Tile::kTokens; first >= 0; first -= Tile::kTokens) {
        x.spread(x_tile);
        grad_y.spread(grad_y_tile);
#pragma unroll
        for (int i = 0; i < kModes; ++i) {
            state[i] = next_state[i];
        }
        __syncthreads();
        start_loading(first - Tile::kTokens);  // on its way while this tile is computed
        const int count = static_cast<int>(smaller<int64_t>(in.T - first, Tile::kTokens));
        walk.take_tile(state, x_tile + place.column, grad_y_tile + place.column, grad_x_tile + place.column, count,
                       starts + threadIdx.x);
        __syncthreads();
        x.store(call.grad_x, first, count, grad_x_tile);
    }

    const bool is_fresh = in.position[place.row] == 0;
#pragma unroll
    for (int i = 0; i < kModes; ++i) {
        gradients[i] = is_fresh ? Complex{0.0f, 0.0f} : walk.grad_state(i);
    }
    store_complex(in, call.grad_past, place.row, range, gradients);
    walk.store_gradients(in, rows, place.row, range);
    const float grad_omega = walk.grad_omega();
    if (place.lane == 0 && place.channel() < in.D) rows.omega[place.row * in.D + place.channel()] = grad_omega;
}

}  // namespace megalodon::complex_ema
