// ChunkAttention of one token: blocks share the past rows of a head, a second kernel joins what they found.
//
// A part of the rows, with scores x_r, is kept as (max, sum, values) = (m, sum of e^(x_r - m), sum of e^(x_r - m) v_r).
#pragma once

#include "operators/chunk_attention/rows.cuh"

namespace megalodon::chunk_attention {

constexpr int kSplitThreads = 256;
constexpr int kSplitWarps = kSplitThreads / kWarpSize;
constexpr int kMaxSplitRows = 256;
constexpr int kRowsAtOnce = 4;    // of keys, whose loads overlap in a thread
constexpr int kValuesAtOnce = 8;  // of values, likewise
constexpr int kAccessBytes = 16;
static_assert(kMaxSplitRows <= kSplitThreads);

/// Elements of one access: 16 bytes where every row is aligned to them.
template <typename Stored, bool kAligned>
constexpr int kVector = kAligned ? kAccessBytes / static_cast<int>(sizeof(Stored)) : 1;

/// How the past rows of each head fall into parts, and where the parts' results lie.
struct Split {
    int rows;       // of a part; kMaxSplitRows at most
    int num_parts;  // for each head of each row of the batch
    float* values;  // [B, H, num_parts, dv]
    float* maxima;  // [B, H, num_parts]
    float* sums;    // [B, H, num_parts]
};

/// The token's query, spread over the lanes that share a row of keys: each holds the columns of its own accesses.
template <int kAccess>
struct QuerySlice {
    static constexpr int kAccesses =
        MGD_MAX_KEY_WIDTH > kWarpSize* kAccess ? MGD_MAX_KEY_WIDTH / (kWarpSize * kAccess) : 1;
    float values[kAccesses][kAccess];
    int lanes;  // that share a row: a power of two
    int lane;   // of those

    __device__ QuerySlice(const ChunkAttentionCall& call, int64_t head, int warp_lane) {
        lanes = 1;
        while (lanes < kWarpSize && lanes * kAccess < call.key_width) {
            lanes *= 2;
        }
        lane = warp_lane % lanes;
#pragma unroll
        for (int a = 0; a < kAccesses; ++a) {
#pragma unroll
            for (int i = 0; i < kAccess; ++i) {
                const int c = column(a) + i;
                values[a][i] = c < call.key_width ? load_float(call.dtype, call.q, head * call.key_width + c) : 0.0f;
            }
        }
    }

    __device__ int column(int access) const { return (access * lanes + lane) * kAccess; }

    /// This lane's accesses to a row of keys; those beyond its end are moved into it, where the query counts as 0.
    template <typename Stored>
    __device__ void load(const Stored* key, int width, Packed<Stored, kAccess> (&keys)[kAccesses]) const {
#pragma unroll
        for (int a = 0; a < kAccesses; ++a) {
            const int inside = column(a) < width ? column(a) : width - kAccess;
            keys[a] = *reinterpret_cast<const Packed<Stored, kAccess>*>(key + inside);
        }
    }

    /// This lane's part of the product.
    template <typename Stored>
    __device__ float dot(const Packed<Stored, kAccess> (&keys)[kAccesses]) const {
        float sum = 0.0f;
#pragma unroll
        for (int a = 0; a < kAccesses; ++a) {
            float columns[kAccess];
            to_floats(keys[a], columns);
#pragma unroll
            for (int i = 0; i < kAccess; ++i) {
                sum += values[a][i] * columns[i];
            }
        }
        return sum;
    }
};

/// `row`, or the last one when there are fewer: loads without a condition overlap, and their result is not used.
__device__ inline int64_t row_in(int row, int count) {
    return row < count ? row : count - 1;
}

/// Scores of `count` rows of keys into shared memory, each row once; scale is null or has one number for each row.
template <int kAccess, typename Stored>
__device__ void score_rows(const QuerySlice<kAccess>& query, const Stored* keys, const float* scale, int count,
                           int width, float* scores) {
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, warp_lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int rows_per_warp = kWarpSize / query.lanes, stride = kSplitWarps * rows_per_warp;
    // The bounds are a warp's, not a lane's: every lane must reach the shuffles.
    for (int first = warp * rows_per_warp; first < count; first += kRowsAtOnce * stride) {
        const int own = first + warp_lane / query.lanes;
        Packed<Stored, kAccess> rows[kRowsAtOnce][QuerySlice<kAccess>::kAccesses];
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            query.load(keys + row_in(own + i * stride, count) * width, width, rows[i]);
        }
#pragma unroll
        for (int i = 0; i < kRowsAtOnce; ++i) {
            const int r = own + i * stride;
            float product = query.dot(rows[i]);
            for (int distance = query.lanes / 2; distance > 0; distance /= 2) {
                product += __shfl_xor_sync(kWholeWarp, product, distance);
            }
            if (r < count) scores[r] = scale == nullptr ? product : product * scale[r];
        }
    }
}

/// Sum of weight times row of values for `count` rows, into `sums` [dv]. Threads own columns; where there are more
/// threads than columns, groups of them share the rows.
template <bool kAligned, typename Stored>
__device__ void sum_values(const Stored* values, const float* weights, int count, int width, float* partial,
                           float* sums) {
    constexpr int kAccess = kVector<Stored, kAligned>;
    const int thread = static_cast<int>(threadIdx.x), num_accesses = width / kAccess;
    const int group_threads = num_accesses < kSplitThreads ? num_accesses : kSplitThreads;
    const int num_groups = kSplitThreads / group_threads, group = thread / group_threads;
    if (group < num_groups) {
        for (int access = thread % group_threads; access < num_accesses; access += group_threads) {
            const int column = access * kAccess;
            float totals[kAccess] = {};
            for (int first = group; first < count; first += kValuesAtOnce * num_groups) {
                Packed<Stored, kAccess> rows[kValuesAtOnce];
#pragma unroll
                for (int k = 0; k < kValuesAtOnce; ++k) {
                    const Stored* row = values + row_in(first + k * num_groups, count) * width;
                    rows[k] = *reinterpret_cast<const Packed<Stored, kAccess>*>(row + column);
                }
#pragma unroll
                for (int k = 0; k < kValuesAtOnce; ++k) {
                    const int r = first + k * num_groups;
                    const float weight = r < count ? weights[r] : 0.0f;
                    float columns[kAccess];
                    to_floats(rows[k], columns);
#pragma unroll
                    for (int i = 0; i < kAccess; ++i) {
                        totals[i] += weight * columns[i];
                    }
                }
            }
            float* target = num_groups == 1 ? sums : partial + group * width;
#pragma unroll
            for (int i = 0; i < kAccess; ++i) {
                target[column + i] = totals[i];
            }
        }
    }
    if (num_groups == 1) return;  // the same for every thread
    __syncthreads();
    for (int column = thread; column < width; column += kSplitThreads) {
        float total = 0.0f;
        for (int g = 0; g < num_groups; ++g) {
            total += partial[g * width + column];
        }
        sums[column] = total;
    }
}

/// Grid: a block for each part of the past rows of each head; blocks beyond the filled rows leave at once.
template <typename Stored, bool kAligned>
__global__ void __launch_bounds__(kSplitThreads) split_kernel(ChunkAttentionCall call, Split split) {
    constexpr int kAccess = kVector<Stored, kAligned>;
    MGD_SHARED(float, scores, kMaxSplitRows);
    MGD_SHARED(float, weights, kMaxSplitRows);
    MGD_SHARED(float, partial, kSplitThreads* kAccess);
    const int64_t head = blockIdx.x / split.num_parts, b = head / call.H;
    const int64_t first = blockIdx.x % split.num_parts * static_cast<int64_t>(split.rows);
    const int64_t left = filled_rows(call, b) - first;
    if (left <= 0) return;
    const int count = left < split.rows ? static_cast<int>(left) : split.rows;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize;
    const int64_t row = head * call.S + first;

    const Stored* keys = static_cast<const Stored*>(call.past_key) + row * call.key_width;
    const float* key_scale = call.past_key_scale == nullptr ? nullptr : call.past_key_scale + row;
    score_rows(QuerySlice<kAccess>(call, head, lane), keys, key_scale, count, call.key_width, scores);
    __syncthreads();
    float highest = -INFINITY, sum = 0.0f;  // of all rows, in every warp
    for (int r = lane; r < count; r += kWarpSize) {
        highest = fmaxf(highest, scores[r]);
    }
    highest = max_over_lanes<kWarpSize>(highest);
    for (int r = lane; r < count; r += kWarpSize) {
        sum += expf(scores[r] - highest);
    }
    sum = sum_over_lanes<kWarpSize>(sum);
    if (thread < count) {
        const float scale = call.past_value_scale == nullptr ? 1.0f : call.past_value_scale[row + thread];
        weights[thread] = expf(scores[thread] - highest) * scale;
    }
    if (thread == 0) {
        split.maxima[blockIdx.x] = highest;
        split.sums[blockIdx.x] = sum;
    }
    __syncthreads();
    const Stored* values = static_cast<const Stored*>(call.past_value) + row * call.value_width;
    float* sums = split.values + static_cast<int64_t>(blockIdx.x) * call.value_width;
    sum_values<kAligned>(values, weights, count, call.value_width, partial, sums);
}

constexpr int kJoinWarps = 8;
constexpr int kJoinThreads = kJoinWarps * kWarpSize;

/// q.k of the token itself; every lane gets it.
__device__ inline float own_score(const ChunkAttentionCall& call, int64_t head, int lane) {
    float sum = 0.0f;
    for (int c = lane; c < call.key_width; c += kWarpSize) {
        const int64_t index = head * call.key_width + c;
        sum += load_float(call.dtype, call.q, index) * load_float(call.dtype, call.k, index);
    }
    return sum_over_lanes<kWarpSize>(sum);
}

/// Joins the parts of the past with the token's own row. Grid: a block for each 32 columns of each head, whose warps
/// share the parts.
__global__ void __launch_bounds__(kJoinThreads) join_kernel(ChunkAttentionCall call, Split split) {
    MGD_SHARED(float, totals, kJoinThreads);
    const unsigned column_blocks = static_cast<unsigned>(call.value_width + kWarpSize - 1) / kWarpSize;
    const unsigned head_index = blockIdx.x / column_blocks;  // divided as 64 bits, some GPUs run out of registers
    const int64_t head = head_index, b = head_index / static_cast<unsigned>(call.H);
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int column = static_cast<int>(blockIdx.x % column_blocks) * kWarpSize + lane;
    const int num_filled = static_cast<int>((filled_rows(call, b) + split.rows - 1) / split.rows);
    const float* maxima = split.maxima + head * split.num_parts;
    const float* sums = split.sums + head * split.num_parts;
    const float* values = split.values + head * split.num_parts * call.value_width;

    const float own = own_score(call, head, lane);
    float highest = own;
    for (int part = lane; part < num_filled; part += kWarpSize) {
        highest = fmaxf(highest, maxima[part]);
    }
    highest = max_over_lanes<kWarpSize>(highest);
    float sum = 0.0f;
    for (int part = lane; part < num_filled; part += kWarpSize) {
        sum += expf(maxima[part] - highest) * sums[part];
    }
    sum = sum_over_lanes<kWarpSize>(sum) + expf(own - highest);

    float total = 0.0f;
    if (column < call.value_width) {
#pragma unroll 4
        for (int part = warp; part < num_filled; part += kJoinWarps) {
            total += expf(maxima[part] - highest) * values[static_cast<int64_t>(part) * call.value_width + column];
        }
    }
    totals[threadIdx.x] = total;
    __syncthreads();
    if (warp > 0 || column >= call.value_width) return;
    const int64_t index = head * call.value_width + column;
    total = expf(own - highest) * load_float(call.dtype, call.v, index);
    for (int w = 0; w < kJoinWarps; ++w) {
        total += totals[w * kWarpSize + lane];
    }
    store_float(call.dtype, call.out, index, total / sum);
}

}  // namespace megalodon::chunk_attention
