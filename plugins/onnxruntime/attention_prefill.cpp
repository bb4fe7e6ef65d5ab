// ChunkAttention for many tokens: blocks of queries walk over the keys that they see, with a running softmax.
//
// Both products are made of tiles of 8 rows by 16 columns that stay in registers while they walk along the other axis:
// keys by queries, then queries by columns of the values. The columns are packed side by side first.

#include <limits>

#include "onnxruntime/attention.h"

namespace megalodon::ort {
namespace {

constexpr int64_t kColumns = 16;  // of a tile
constexpr int64_t kTile = 8;      // rows of a tile
constexpr int64_t kQueries = 48;  // of a block
constexpr int64_t kKeys = 64;     // of a block
constexpr int64_t kStripes = 4;   // of kColumns values that are packed together: short pieces of rows come slowly
static_assert(kQueries % kColumns == 0 && kQueries % kTile == 0 && kKeys % kTile == 0, "whole tiles");
constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef float Columns __attribute__((vector_size(kColumns * sizeof(float)), aligned(alignof(float))));

/// Where a tile finds its left factor: element [i, j] is data[i * row + j * step].
struct Factor {
    const float* data;
    int64_t row, step;
};

/// out [8, 16] = out times a factor for each row + left [8, size] times packed [size, 16].
MGD_INLINE void multiply_tile(const Factor& left, const float* packed, int64_t size, float* out, int64_t out_stride,
                              const float* factors) {
    Columns sums[kTile];
    for (int64_t i = 0; i < kTile; ++i)
        sums[i] = *reinterpret_cast<const Columns*>(out + i * out_stride) * factors[i];
    for (int64_t j = 0; j < size; ++j) {
        const Columns column = *reinterpret_cast<const Columns*>(packed + j * kColumns);
        for (int64_t i = 0; i < kTile; ++i)
            sums[i] += left.data[i * left.row + j * left.step] * column;
    }
    for (int64_t i = 0; i < kTile; ++i)
        *reinterpret_cast<Columns*>(out + i * out_stride) = sums[i];
}

/// Rows [first, first + count) of a head's keys and values, past or new.
struct KeyBlock {
    Rows keys, values;
    int64_t first, count;
    bool is_new;
};

/// A block of queries of one head, and the memory that it works in.
class QueryBlock {
 public:
    QueryBlock(const Attention& attention, int64_t head, int64_t first)
        : attention_(attention),
          head_(head),
          first_(first),
          count_(std::min(kQueries, attention.T - first)),
          stride_((attention.dv + kColumns - 1) / kColumns * kColumns),
          queries_(static_cast<size_t>(kQueries * attention.dz)),
          totals_(static_cast<size_t>(kQueries * stride_)),
          rows_(static_cast<size_t>(kKeys * std::max(attention.dz, attention.dv))) {
        std::fill(most_, most_ + kQueries, std::numeric_limits<float>::lowest());
        const float* q = attention.q + (head * attention.T + first) * attention.dz;
        for (int64_t i = 0; i < count_; ++i) {
            float* column = queries_.data() + i / kColumns * kColumns * attention.dz + i % kColumns;
            for (int64_t j = 0; j < attention.dz; ++j)
                column[j * kColumns] = q[i * attention.dz + j];
        }
    }

    void run() {
        const int64_t filled = attention_.filled(head_), T = attention_.T;
        for (int64_t row = 0; row < filled; row += kKeys)
            take({attention_.keys(head_), attention_.values(head_), row, std::min(kKeys, filled - row), false});
        const Rows keys{attention_.k + head_ * T * attention_.dz, nullptr, kFloat, attention_.dz};
        const Rows values{attention_.v + head_ * T * attention_.dv, nullptr, kFloat, attention_.dv};
        for (int64_t row = 0; row < first_ + count_; row += kKeys)
            take({keys, values, row, std::min(kKeys, first_ + count_ - row), true});
        write();
    }

 private:
    void take(const KeyBlock& block) {
        score(block);
        weigh(block);
        add_values(block);
    }

    /// The block's rows in float32, followed by rows of zeros up to a whole tile.
    MGD_INLINE const float* widened(const Rows& rows, const KeyBlock& block) {
        const int64_t width = rows.width;
        if (rows.type == kFloat && block.count % kTile == 0) return rows.row(block.first, nullptr);
        for (int64_t j = 0; j < block.count; ++j) {
            float* own = rows_.data() + j * width;
            const float* row = rows.row(block.first + j, own);
            if (row != own) std::copy(row, row + width, own);
        }
        const int64_t whole = (block.count + kTile - 1) / kTile * kTile;
        std::fill(rows_.data() + block.count * width, rows_.data() + whole * width, 0.0f);
        return rows_.data();
    }

    /// weights_ [keys, queries] = keys times queries.
    MGD_VECTORISED void score(const KeyBlock& block) {
        const int64_t dz = attention_.dz;
        const float zeros[kTile] = {};
        const float* keys = widened(block.keys, block);
        std::fill(&weights_[0][0], &weights_[0][0] + kKeys * kQueries, 0.0f);
        for (int64_t j = 0; j < block.count; j += kTile) {
            for (int64_t i = 0; i < count_; i += kColumns)
                multiply_tile({keys + j * dz, dz, 1}, queries_.data() + i * dz, dz, &weights_[j][i], kQueries, zeros);
        }
    }

    /// Scores into weights relative to the largest so far; what was added up before shrinks by `shrink_`.
    MGD_VECTORISED void weigh(const KeyBlock& block) {
        float most[kQueries], sums[kQueries] = {};
        std::copy(most_, most_ + kQueries, most);
        for (int64_t j = 0; j < block.count; ++j) {
            // A key of the call is for its own token and later ones.
            const int64_t hidden = block.is_new ? std::clamp<int64_t>(block.first + j - first_, 0, kQueries) : 0;
            std::fill(weights_[j], weights_[j] + hidden, -kInfinity);
            const float scale = block.keys.scale(block.first + j);
            for (int64_t i = 0; i < kQueries; ++i) {
                weights_[j][i] *= scale;
                most[i] = weights_[j][i] > most[i] ? weights_[j][i] : most[i];
            }
        }
        for (int64_t j = 0; j < block.count; ++j) {
            const float scale = block.values.scale(block.first + j);
            for (int64_t i = 0; i < kQueries; ++i) {
                const float weight = exponential(weights_[j][i] - most[i]);
                sums[i] += weight;
                weights_[j][i] = weight * scale;
            }
        }
        for (int64_t i = 0; i < kQueries; ++i) {
            shrink_[i] = exponential(most_[i] - most[i]);
            sums_[i] = sums_[i] * shrink_[i] + sums[i];
            most_[i] = most[i];
        }
    }

    MGD_VECTORISED void add_values(const KeyBlock& block) {
        const int64_t dv = attention_.dv;
        const float* values = widened(block.values, block);
        float packed[kStripes][kKeys * kColumns];
        for (int64_t first = 0; first < dv; first += kStripes * kColumns) {
            const int64_t num_stripes = std::min(kStripes, (stride_ - first) / kColumns);
            for (int64_t j = 0; j < block.count; ++j) {
                const float* row = values + j * dv + first;
                for (int64_t stripe = 0; stripe < num_stripes; ++stripe)
                    pack(row + stripe * kColumns, dv - first - stripe * kColumns, packed[stripe] + j * kColumns);
            }
            for (int64_t stripe = 0; stripe < num_stripes; ++stripe) {
                for (int64_t i = 0; i < count_; i += kTile)
                    multiply_tile({&weights_[0][i], 1, kQueries}, packed[stripe], block.count,
                                  totals_.data() + i * stride_ + first + stripe * kColumns, stride_, shrink_ + i);
            }
        }
    }

    /// A row's columns of a stripe, of which `present` are there.
    MGD_INLINE static void pack(const float* row, int64_t present, float* packed) {
        if (present >= kColumns) {
            std::memcpy(packed, row, kColumns * sizeof(float));
            return;
        }
        for (int64_t i = 0; i < kColumns; ++i)
            packed[i] = i < present ? row[i] : 0.0f;
    }

    MGD_VECTORISED void write() const {
        const int64_t dv = attention_.dv;
        for (int64_t i = 0; i < count_; ++i) {
            float* out = attention_.out + (head_ * attention_.T + first_ + i) * dv;
            for (int64_t column = 0; column < dv; ++column)
                out[column] = totals_[static_cast<size_t>(i * stride_ + column)] / sums_[i];
        }
    }

    const Attention& attention_;
    int64_t head_, first_, count_;  // queries [first, first + count) of a head of B * H
    int64_t stride_;                // of totals_
    std::vector<float> queries_;    // [kQueries / kColumns, dz, kColumns], zeros behind the last
    std::vector<float> totals_;     // [kQueries, dv, rounded up to kColumns]
    std::vector<float> rows_;       // [kKeys, dz or dv]
    float weights_[kKeys][kQueries];
    float most_[kQueries], sums_[kQueries] = {}, shrink_[kQueries];
};

}  // namespace

void attend_tokens(const Call& call, const Attention& attention) {
    const int64_t num_blocks = (attention.T + kQueries - 1) / kQueries;
    call.parallel(attention.B * attention.H * num_blocks, 1, [&](int64_t begin, int64_t end) {
        // A head's last blocks, which see the most keys, come first: the others fill up the threads' time.
        for (int64_t i = begin; i < end; ++i)
            QueryBlock(attention, i / num_blocks, (num_blocks - 1 - i % num_blocks) * kQueries).run();
    });
}

}  // namespace megalodon::ort
