// A tile: some tokens of a block's channels, in shared memory as float32, and its way from and to global memory.
#pragma once

#include "operators/complex_ema/mode.cuh"

namespace megalodon::complex_ema {

/// Where a block works: one row, Layout::kChannels channels.
struct Place {
    int64_t row, first_channel;
    int lane, column;  // of this thread: its lane within a channel, its channel within the block

    __device__ int64_t channel() const { return first_channel + column; }
};

/// `block` counts channels first, then rows.
template <typename Layout>
__device__ inline Place place_of(const ComplexEmaInputs& in, int64_t block) {
    const int64_t blocks_per_row = (in.D + Layout::kChannels - 1) / Layout::kChannels;
    const int thread = static_cast<int>(threadIdx.x);
    return {block / blocks_per_row, block % blocks_per_row * Layout::kChannels, thread % Layout::kLanes,
            thread / Layout::kLanes};
}

/// A tile's layout in shared memory, [kTokens, kStride] floats. The padding lets the lanes of a channel, which write
/// neighbouring tokens, reach different banks.
template <typename Layout, int kTokens_>
struct Tile {
    static constexpr int kTokens = kTokens_;
    static constexpr int kChannels = Layout::kChannels;
    static constexpr int kThreads = Layout::kThreads;
    static constexpr int kStride = kChannels + (Layout::kLanes <= 8 ? 32 / Layout::kLanes % 32 : 4);
    static constexpr int kFloats = kTokens * kStride;
};

/// Eight neighbouring channels of one token on their way between memories, in their own type.
class Octet {
 public:
    static constexpr int kSize = 8;

    /// Starts loading those that exist, `available`; the others are zero. Nothing waits here.
    template <typename Activation>
    __device__ void load(const Activation* source, int64_t available, bool is_aligned) {
        constexpr int kPacks = kSize / kPackSize<Activation>;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const int first = i * kPackSize<Activation>;
            const Pack<Activation> pack = load_pack(source + first, available - first, is_aligned);
            memcpy(&parts_[i], &pack, sizeof(pack));
        }
    }

    template <typename Activation>
    __device__ void spread(float* target) const {
        constexpr int kPacks = kSize / kPackSize<Activation>;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            Pack<Activation> pack;
            memcpy(&pack, &parts_[i], sizeof(pack));
#pragma unroll
            for (int k = 0; k < kPackSize<Activation>; ++k) {
                target[i * kPackSize<Activation> + k] = to_float(pack.elements[k]);
            }
        }
    }

    /// Rounds eight numbers and writes those that `target` has room for.
    template <typename Activation>
    __device__ static void store(Activation* target, const float* source, int64_t available, bool is_aligned) {
#pragma unroll
        for (int first = 0; first < kSize; first += kPackSize<Activation>) {
            Pack<Activation> pack;
#pragma unroll
            for (int k = 0; k < kPackSize<Activation>; ++k) {
                pack.elements[k] = from_float<Activation>(source[first + k]);
            }
            store_pack(target + first, pack, available - first, is_aligned);
        }
    }

 private:
    Pack<float> parts_[2] = {};
};

/// One thread's share of a tile of a tensor [B, T, D].
template <typename Tile>
class TileTransfer {
 public:
    __device__ TileTransfer(const ComplexEmaInputs& in, const Place& place)
        : D_(in.D),
          offset_(place.row * in.T * in.D + place.first_channel),
          num_channels_(in.D - place.first_channel),
          dtype_(in.dtype) {}

    /// Starts loading the tokens first .. first + num_tokens of `tensor`; others count as zero.
    __device__ void load(const void* tensor, int64_t first, int64_t num_tokens) {
        with_activation(dtype_, [&](auto zero) {
            const auto* source = static_cast<const decltype(zero)*>(tensor);
            const bool is_aligned = has_aligned_packs(source, D_);
#pragma unroll
            for (int i = 0; i < kShare; ++i) {
                const int token = token_of(i), column = column_of(i);
                const int64_t available = token < num_tokens ? num_channels_ - column : 0;
                octets_[i].load(source + offset_ + (first + token) * D_ + column, available, is_aligned);
            }
        });
    }

    /// Writes what was loaded to a tile in shared memory, as float32.
    __device__ void spread(float* tile) const {
        with_activation(dtype_, [&](auto zero) {
#pragma unroll
            for (int i = 0; i < kShare; ++i) {
                if (!is_inside(i)) continue;
                octets_[i].template spread<decltype(zero)>(tile + token_of(i) * Tile::kStride + column_of(i));
            }
        });
    }

    /// Writes the tile's first `num_tokens` tokens to `tensor`, from token `first` on.
    __device__ void store(void* tensor, int64_t first, int64_t num_tokens, const float* tile) const {
        with_activation(dtype_, [&](auto zero) {
            auto* target = static_cast<decltype(zero)*>(tensor);
            const bool is_aligned = has_aligned_packs(target, D_);
#pragma unroll
            for (int i = 0; i < kShare; ++i) {
                const int token = token_of(i), column = column_of(i);
                if (token >= num_tokens) continue;  // so are all octets outside the tile
                Octet::store(target + offset_ + (first + token) * D_ + column, tile + token * Tile::kStride + column,
                             num_channels_ - column, is_aligned);
            }
        });
    }

 private:
    static constexpr int kOctetsPerToken = Tile::kChannels / Octet::kSize;
    static constexpr int kOctets = Tile::kTokens * kOctetsPerToken;
    static constexpr int kShare = (kOctets + Tile::kThreads - 1) / Tile::kThreads;

    __device__ static int index_of(int i) { return i * Tile::kThreads + static_cast<int>(threadIdx.x); }
    __device__ static bool is_inside(int i) { return kOctets % Tile::kThreads == 0 || index_of(i) < kOctets; }
    /// At least kTokens for an octet outside the tile.
    __device__ static int token_of(int i) { return index_of(i) / kOctetsPerToken; }
    __device__ static int column_of(int i) { return index_of(i) % kOctetsPerToken * Octet::kSize; }

    const int64_t D_, offset_, num_channels_;
    const int dtype_;
    Octet octets_[kShare];
};

}  // namespace megalodon::complex_ema
