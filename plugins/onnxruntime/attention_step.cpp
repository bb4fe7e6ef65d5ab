// ChunkAttention for one token: bound by reading keys and values, so their rows are shared out to all threads.
//
// The rows of a head are cut into parts of a fixed length, whatever the number of threads is: results do not depend on
// it.

#include <limits>

#include "onnxruntime/attention.h"

namespace megalodon::ort {
namespace {

constexpr int64_t kPartRows = 32;
constexpr int64_t kGrain = 1 << 14;  // numbers of memory that are worth a thread

struct Part {
    int64_t head, first, count;  // head of B * H, rows of it
    float most, sum;             // largest score, sum of e^(score - most)
};

MGD_INLINE float dot(const float* a, const float* b, int64_t size) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i)
        sum += a[i] * b[i];
    return sum;
}

MGD_INLINE void add_scaled(float* out, const float* row, float factor, int64_t size) {
    for (int64_t i = 0; i < size; ++i)
        out[i] += factor * row[i];
}

/// total [dv] = sum of e^(score - most) times value over the rows of a part.
MGD_VECTORISED void attend_part(const float* q, const Rows& keys, const Rows& values, Part& part, float* total,
                                float* scratch) {
    float weights[kPartRows];
    part.most = std::numeric_limits<float>::lowest();
    for (int64_t i = 0; i < part.count; ++i) {
        const int64_t row = part.first + i;
        weights[i] = dot(q, keys.row(row, scratch), keys.width) * keys.scale(row);
        part.most = std::max(part.most, weights[i]);
    }
    part.sum = 0;
    std::fill(total, total + values.width, 0.0f);
    for (int64_t i = 0; i < part.count; ++i) {
        const int64_t row = part.first + i;
        const float weight = exponential(weights[i] - part.most);
        part.sum += weight;
        add_scaled(total, values.row(row, scratch), weight * values.scale(row), values.width);
    }
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
    std::vector<float> totals(parts.size() * width);
    const auto num_parts = static_cast<int64_t>(parts.size());
    call.parallel(num_parts, kGrain / (kPartRows * (dz + dv)), [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(static_cast<size_t>(std::max(dz, dv)));
        for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
            const int64_t head = parts[i].head;
            attend_part(attention.q + head * dz, attention.keys(head), attention.values(head), parts[i],
                        totals.data() + i * width, scratch.data());
        }
    });
    for (size_t head = 0; head < static_cast<size_t>(num_heads); ++head) {
        const size_t begin = first_part[head], end = first_part[head + 1];
        join(attention, static_cast<int64_t>(head), parts.data() + begin, parts.data() + end,
             totals.data() + begin * width);
    }
}

}  // namespace megalodon::ort
