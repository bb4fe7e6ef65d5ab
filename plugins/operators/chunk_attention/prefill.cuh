// ChunkAttention of many tokens: a block takes 64 queries and up to 256 columns of the values, and walks the keys they
// see 64 at a time, with a running maximum and sum for each query. Tiles that no query sees are never read.
#pragma once

#include "operators/chunk_attention/rows.cuh"

namespace megalodon::chunk_attention {

constexpr int kTile = 64;          // queries of a block, and keys at a time
constexpr int kTileColumns = 256;  // of the values
constexpr int kSliceWidth = 32;    // columns of queries and keys in shared memory at a time
constexpr int kSliceRows = 16;     // rows of values in shared memory at a time
constexpr int kPrefillThreads = 256;
constexpr int kQuad = 4;
constexpr int kSliceQuads = kSliceWidth / kQuad + 1;  // of a row of a slice; one unused, against bank conflicts
constexpr int kWeightQuads = kTile / kQuad + 1;       // of the weights of a key, likewise
constexpr int kColumnQuads = kTileColumns / kQuad;
constexpr int kWarpQueries = 8;  // each warp works for its own queries
constexpr int kScoreLanes = 16;  // that share four queries; each has every 16th key
constexpr int kScoreKeys = kTile / kScoreLanes;

/// Four floats of shared memory: one access.
struct alignas(16) Quad {
    float values[kQuad];
};

/// Rows of one head of one stored type.
struct Rows {
    const void* data;
    const float* scale;  // one number for each row, or null
    int dtype, width;
    bool is_aligned;  // four neighbours can be one access

    __device__ float scale_of(int64_t row) const { return scale == nullptr ? 1.0f : scale[row]; }

    /// Four columns of a row, 0 beyond the row's end and in rows from `num_rows` on, which are not read.
    __device__ Quad load(int64_t row, int64_t num_rows, int column) const {
        Quad quad{};
        if (row >= num_rows || column >= width) return quad;
        with_type(dtype, [&](auto* type) {
            using Element = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
            const Element* source = static_cast<const Element*>(data) + row * width + column;
            if (is_aligned) {
                load_floats<true>(source, kQuad, quad.values);
            } else {
                load_floats<false>(source, width - column, quad.values);
            }
        });
        return quad;
    }
};

__device__ inline int64_t stored_bytes(int dtype) {
    return dtype == MGD_FLOAT32 ? 4 : dtype == MGD_FLOAT16 || dtype == MGD_BFLOAT16 ? 2 : 1;
}

/// `num_rows` rows for each head, of which those of `head`.
__device__ inline Rows rows_of(int dtype, const void* tensor, const float* scale, int64_t head, int64_t num_rows,
                               int width) {
    const int64_t bytes = stored_bytes(dtype);
    const bool is_aligned = width % kQuad == 0 && reinterpret_cast<uintptr_t>(tensor) % (kQuad * bytes) == 0;
    const char* data = static_cast<const char*>(tensor) + head * num_rows * width * bytes;
    return {data, scale == nullptr ? nullptr : scale + head * num_rows, dtype, width, is_aligned};
}

/// Where a thread stands. Scores: 4 queries x 4 keys; values: the 8 queries of its warp x 8 columns.
struct Place {
    int thread = static_cast<int>(threadIdx.x);
    int lane = thread % kWarpSize;
    int first_warp_query = thread / kWarpSize * kWarpQueries;
    int first_query = thread / kScoreLanes * kQuad;
    int score_lane = thread % kScoreLanes;
};

/// Shared memory of a block. `operands` holds a slice of queries and keys, or of values.
struct Tiles {
    Quad* operands;
    Quad* weights;   // [key][query]
    float* rescale;  // [query]
};
constexpr int kKeyQuads = kTile * kSliceQuads;  // where the keys begin, behind the queries
constexpr int kOperandQuads = 2 * kKeyQuads > kSliceRows* kColumnQuads ? 2 * kKeyQuads : kSliceRows * kColumnQuads;

/// scores [4][4]: queries of the tile at `query_row` times keys of the tile at `key_row`.
__device__ inline void multiply_keys(const Rows& queries, int64_t query_row, int64_t num_queries, const Rows& keys,
                                     int64_t key_row, int64_t num_keys, const Place& place, const Tiles& tiles,
                                     float (&scores)[kQuad][kScoreKeys]) {
    constexpr int kRowQuads = kSliceWidth / kQuad;
    for (int column = 0; column < keys.width; column += kSliceWidth) {
        __syncthreads();  // until everyone is done with what lies there
        for (int i = place.thread; i < kTile * kRowQuads; i += kPrefillThreads) {
            const int row = i / kRowQuads, quad = i % kRowQuads;
            const int target = row * kSliceQuads + quad, source = column + quad * kQuad;
            tiles.operands[target] = queries.load(query_row + row, num_queries, source);
            tiles.operands[kKeyQuads + target] = keys.load(key_row + row, num_keys, source);
        }
        __syncthreads();
#pragma unroll
        for (int quad = 0; quad < kRowQuads; ++quad) {
            Quad query[kQuad], key[kScoreKeys];
#pragma unroll
            for (int i = 0; i < kQuad; ++i) {
                query[i] = tiles.operands[(place.first_query + i) * kSliceQuads + quad];
            }
#pragma unroll
            for (int j = 0; j < kScoreKeys; ++j) {
                key[j] = tiles.operands[kKeyQuads + (place.score_lane + j * kScoreLanes) * kSliceQuads + quad];
            }
#pragma unroll
            for (int i = 0; i < kQuad; ++i) {
#pragma unroll
                for (int j = 0; j < kScoreKeys; ++j) {
#pragma unroll
                    for (int c = 0; c < kQuad; ++c) {
                        scores[i][j] += query[i].values[c] * key[j].values[c];
                    }
                }
            }
        }
    }
}

/// Running maximum and sum of four queries; the 16 lanes that share them hold the same.
struct Softmax {
    float highest[kQuad], sum[kQuad];

    /// Turns a tile's scores into weights and returns by what each query's earlier sums must be multiplied. Every query
    /// sees a key of the first tile, so `highest` is finite from then on.
    __device__ Quad weigh(float (&scores)[kQuad][kScoreKeys]) {
        Quad rescale;
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
            float tile_highest = scores[i][0];
#pragma unroll
            for (int j = 1; j < kScoreKeys; ++j) {
                tile_highest = fmaxf(tile_highest, scores[i][j]);
            }
            const float next = fmaxf(highest[i], max_over_lanes<kScoreLanes>(tile_highest));
            float tile_sum = 0.0f;
#pragma unroll
            for (int j = 0; j < kScoreKeys; ++j) {
                scores[i][j] = expf(scores[i][j] - next);
                tile_sum += scores[i][j];
            }
            rescale.values[i] = expf(highest[i] - next);
            sum[i] = sum[i] * rescale.values[i] + sum_over_lanes<kScoreLanes>(tile_sum);
            highest[i] = next;
        }
        return rescale;
    }
};

/// Adds weights times the tile of values at `key_row` to totals [8 queries][8 columns].
__device__ inline void multiply_values(const Rows& values, int64_t key_row, int64_t num_keys, int first_column,
                                       const Place& place, const Tiles& tiles,
                                       float (&totals)[kWarpQueries][2 * kQuad]) {
    for (int first = 0; first < kTile && key_row + first < num_keys; first += kSliceRows) {
        __syncthreads();  // until everyone is done with what lies there
        for (int i = place.thread; i < kSliceRows * kColumnQuads; i += kPrefillThreads) {
            const int row = first + i / kColumnQuads, column = first_column + i % kColumnQuads * kQuad;
            tiles.operands[i] = values.load(key_row + row, num_keys, column);
        }
        __syncthreads();
#pragma unroll
        for (int row = 0; row < kSliceRows; ++row) {
            Quad weight[2], value[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                weight[half] = tiles.weights[(first + row) * kWeightQuads + place.first_warp_query / kQuad + half];
                value[half] = tiles.operands[row * kColumnQuads + half * kWarpSize + place.lane];
            }
#pragma unroll
            for (int i = 0; i < kWarpQueries; ++i) {
#pragma unroll
                for (int c = 0; c < 2 * kQuad; ++c) {
                    totals[i][c] += weight[i / kQuad].values[i % kQuad] * value[c / kQuad].values[c % kQuad];
                }
            }
        }
    }
}

/// Weights into shared memory, each times its row's scale, and the totals to the new maximum.
__device__ inline void share_weights(const float (&scores)[kQuad][kScoreKeys], const Rows& values, int64_t key_row,
                                     int64_t num_keys, const Quad& rescale, const Place& place, const Tiles& tiles) {
#pragma unroll
    for (int j = 0; j < kScoreKeys; ++j) {
        const int key = place.score_lane + j * kScoreLanes;
        const float scale = key_row + key < num_keys ? values.scale_of(key_row + key) : 0.0f;
        Quad weights;
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
            weights.values[i] = scores[i][j] * scale;
        }
        tiles.weights[key * kWeightQuads + place.first_query / kQuad] = weights;
    }
    if (place.score_lane == 0) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
            tiles.rescale[place.first_query + i] = rescale.values[i];
        }
    }
}

/// Grid: a block for each tile of queries and of columns of each head; late queries, which see most, come first.
__global__ void __launch_bounds__(kPrefillThreads) prefill_kernel(ChunkAttentionCall call) {
    MGD_SHARED(Quad, operands, kOperandQuads);
    MGD_SHARED(Quad, weights, kTile * kWeightQuads);
    MGD_SHARED(float, rescale, kTile);
    const Tiles tiles{operands, weights, rescale};
    const Place place;
    const int64_t num_columns = (call.value_width + kTileColumns - 1) / kTileColumns;
    const int64_t num_heads = call.B * call.H, num_tiles = (call.T + kTile - 1) / kTile;
    const int first_column = static_cast<int>(blockIdx.x % num_columns) * kTileColumns;
    const int64_t head = blockIdx.x / num_columns % num_heads;
    const int64_t query_tile = num_tiles - 1 - blockIdx.x / num_columns / num_heads, query_row = query_tile * kTile;
    const int64_t filled = filled_rows(call, head / call.H), past_tiles = (filled + kTile - 1) / kTile;

    const Rows queries = rows_of(call.dtype, call.q, nullptr, head, call.T, call.key_width);
    float totals[kWarpQueries][2 * kQuad] = {};
    Softmax softmax;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
        softmax.highest[i] = -INFINITY;
        softmax.sum[i] = 0.0f;
    }
    for (int64_t tile = 0; tile < past_tiles + query_tile + 1; ++tile) {
        const bool is_past = tile < past_tiles;
        const int64_t key_row = (is_past ? tile : tile - past_tiles) * kTile, num_keys = is_past ? filled : call.T;
        const Rows keys =
            is_past ? rows_of(call.past_dtype, call.past_key, call.past_key_scale, head, call.S, call.key_width)
                    : rows_of(call.dtype, call.k, nullptr, head, call.T, call.key_width);
        const Rows values =
            is_past ? rows_of(call.past_dtype, call.past_value, call.past_value_scale, head, call.S, call.value_width)
                    : rows_of(call.dtype, call.v, nullptr, head, call.T, call.value_width);
        float scores[kQuad][kScoreKeys] = {};
        multiply_keys(queries, query_row, call.T, keys, key_row, num_keys, place, tiles, scores);
#pragma unroll
        for (int j = 0; j < kScoreKeys; ++j) {
            const int64_t key = key_row + place.score_lane + j * kScoreLanes;
            const float scale = key < num_keys ? keys.scale_of(key) : 0.0f;
#pragma unroll
            for (int i = 0; i < kQuad; ++i) {
                const bool is_seen = key < num_keys && (is_past || key <= query_row + place.first_query + i);
                scores[i][j] = is_seen ? scores[i][j] * scale : -INFINITY;
            }
        }
        const Quad factors = softmax.weigh(scores);
        share_weights(scores, values, key_row, num_keys, factors, place, tiles);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kWarpQueries; ++i) {
#pragma unroll
            for (int c = 0; c < 2 * kQuad; ++c) {
                totals[i][c] *= tiles.rescale[place.first_warp_query + i];
            }
        }
        multiply_values(values, key_row, num_keys, first_column, place, tiles, totals);
    }
    if (place.score_lane == 0) {
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
            tiles.rescale[place.first_query + i] = 1.0f / softmax.sum[i];
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWarpQueries; ++i) {
        const int64_t t = query_row + place.first_warp_query + i;
#pragma unroll
        for (int c = 0; c < 2 * kQuad; ++c) {
            const int column = first_column + (c / kQuad * kWarpSize + place.lane) * kQuad + c % kQuad;
            if (t < call.T && column < call.value_width) {
                const int64_t index = (head * call.T + t) * call.value_width + column;
                store_float(call.dtype, call.out, index, totals[i][c] * tiles.rescale[place.first_warp_query + i]);
            }
        }
    }
}

}  // namespace megalodon::chunk_attention
