// ChunkAttention for one token: bound by reading keys and values, so their rows are shared out to all threads.
//
// The rows of a head are cut into parts of a fixed length, whatever the number of threads is: results do not depend on
// it.

#include <limits>
#include <memory>

#include "onnxruntime/attention.h"

namespace megalodon::ort {
namespace {

constexpr int64_t kPartRows = 64;
constexpr int64_t kGrain = 1 << 14;  // numbers of memory that are worth a thread
constexpr int64_t kStretch = 256;    // columns between two requests for memory
constexpr size_t kCacheLineBytes = 64;

struct Part {
    int64_t head, first, count;  // head of B * H, rows of it
    float most, sum;             // largest score, sum of e^(score - most)
};

template <typename Element>
MGD_INLINE float dot(const float* a, const Element* b, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i)
        sum += a[i] * to_float(b[i]);
    return sum;
}

/// products [4] of a [size] with rows [4, size].
template <typename Element>
MGD_INLINE void dot_four(const float* a, const Element* rows, int64_t size, float* products) {
    const Element *row1 = rows + size, *row2 = row1 + size, *row3 = row2 + size;
    float sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
    for (int64_t i = 0; i < size; ++i) {
        sum0 += a[i] * to_float(rows[i]);
        sum1 += a[i] * to_float(row1[i]);
        sum2 += a[i] * to_float(row2[i]);
        sum3 += a[i] * to_float(row3[i]);
    }
    products[0] = sum0, products[1] = sum1, products[2] = sum2, products[3] = sum3;
}

template <typename Element>
MGD_INLINE void add_scaled(float* out, const Element* row, float factor, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i)
        out[i] += factor * to_float(row[i]);
}

/// The same with rows [4, size] and factors [4]. The four rows behind them are asked for meanwhile: a processor
/// foresees what lies on a page from its first reads there, and rows of codes are shorter than a page.
template <typename Element>
MGD_INLINE void add_four_scaled(float* out, const Element* rows, const float* factors, int64_t size) {
    const Element *row1 = rows + size, *row2 = row1 + size, *row3 = row2 + size;
    const float factor0 = factors[0], factor1 = factors[1], factor2 = factors[2], factor3 = factors[3];
    for (int64_t begin = 0; begin < size; begin += kStretch) {
        const int64_t end = std::min(begin + kStretch, size);
        for (int row = 4; row < 8; ++row) {
            const auto* next = reinterpret_cast<const char*>(rows + row * size + begin);
            for (size_t line = 0; line < kStretch * sizeof(Element); line += kCacheLineBytes)
                __builtin_prefetch(next + line);
        }
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) {
            const float first_two = factor0 * to_float(rows[i]) + factor1 * to_float(row1[i]);
            out[i] += first_two + (factor2 * to_float(row2[i]) + factor3 * to_float(row3[i]));
        }
    }
}

/// Codes are taken by four rows: they are converted without passing through memory, and `total` is read and written
/// less often. Rows of float32 are taken one at a time: memory brings them no faster.
template <typename Element>
MGD_INLINE void attend_rows(const float* q, const Rows& keys, const Rows& values, Part& part, float* total) {
    const auto* key = static_cast<const Element*>(keys.data) + part.first * keys.width;
    const auto* value = static_cast<const Element*>(values.data) + part.first * values.width;
    const int64_t by_four = sizeof(Element) == 1 ? part.count / 4 * 4 : 0;
    float weights[kPartRows];
    for (int64_t i = 0; i < by_four; i += 4)
        dot_four(q, key + i * keys.width, keys.width, weights + i);
    for (int64_t i = by_four; i < part.count; ++i)
        weights[i] = dot(q, key + i * keys.width, keys.width);
    part.most = std::numeric_limits<float>::lowest();
    for (int64_t i = 0; i < part.count; ++i) {
        weights[i] *= keys.scale(part.first + i);
        part.most = std::max(part.most, weights[i]);
    }
    part.sum = 0;
    for (int64_t i = 0; i < part.count; ++i) {
        const float weight = exponential(weights[i] - part.most);
        part.sum += weight;
        weights[i] = weight * values.scale(part.first + i);
    }
    std::fill(total, total + values.width, 0.0f);
    for (int64_t i = 0; i < by_four; i += 4)
        add_four_scaled(total, value + i * values.width, weights + i, values.width);
    for (int64_t i = by_four; i < part.count; ++i)
        add_scaled(total, value + i * values.width, weights[i], values.width);
}

/// total [dv] = sum of e^(score - most) times value over the rows of a part.
MGD_VECTORISED void attend_part(const float* q, const Rows& keys, const Rows& values, Part& part, float* total) {
    if (keys.type == kInt8) return attend_rows<int8_t>(q, keys, values, part, total);
    if (keys.type == kFloat8E4M3) return attend_rows<uint8_t>(q, keys, values, part, total);
    attend_rows<float>(q, keys, values, part, total);
}

/// out [dv] from the parts of a head, whose totals lie one after the other, and the token's own key and value.
MGD_VECTORISED void join(const Attention& attention, int64_t head, const Part* first, const Part* last,
                         const float* totals) {
    const int64_t dz = attention.dz, dv = attention.dv;
    float* out = attention.out + head * dv;
    const float own = dot(attention.q + head * dz, attention.k + head * dz, dz);
    float most = own;
    for (const Part* part = first; part != last; ++part)
        most = std::max(most, part->most);
    float sum = exponential(own - most);
    std::fill(out, out + dv, 0.0f);
    add_scaled(out, attention.v + head * dv, sum, dv);
    for (const Part* part = first; part != last; ++part, totals += dv) {
        const float factor = exponential(part->most - most);
        sum += factor * part->sum;
        add_scaled(out, totals, factor, dv);
    }
    for (int64_t i = 0; i < dv; ++i)
        out[i] /= sum;
}

}  // namespace

void attend_one_token(const Call& call, const Attention& attention) {
    const int64_t dz = attention.dz, dv = attention.dv, num_heads = attention.B * attention.H;
    std::vector<Part> parts;
    std::vector<size_t> first_part(static_cast<size_t>(num_heads) + 1);
    for (int64_t head = 0; head < num_heads; ++head) {
        for (int64_t row = 0; row < attention.filled(head); row += kPartRows)
            parts.push_back({head, row, std::min(kPartRows, attention.filled(head) - row), 0, 0});
        first_part[static_cast<size_t>(head) + 1] = parts.size();
    }
    const auto width = static_cast<size_t>(dv);
    const std::unique_ptr<float[]> totals(new float[parts.size() * width]);  // not a vector, which would write zeros
    const auto num_parts = static_cast<int64_t>(parts.size());
    call.parallel(num_parts, kGrain / (kPartRows * (dz + dv)), [&](int64_t begin, int64_t end) {
        for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
            const int64_t head = parts[i].head;
            attend_part(attention.q + head * dz, attention.keys(head), attention.values(head), parts[i],
                        totals.get() + i * width);
        }
    });
    for (size_t head = 0; head < static_cast<size_t>(num_heads); ++head) {
        const size_t begin = first_part[head], end = first_part[head + 1];
        join(attention, static_cast<int64_t>(head), parts.data() + begin, parts.data() + end,
             totals.get() + begin * width);
    }
}

}  // namespace megalodon::ort
