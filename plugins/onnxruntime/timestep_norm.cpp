// TimestepNorm on the CPU: a group's statistics walk through the tokens in float64.

#include <cmath>

#include "megalodon/state_layout.h"
#include "onnxruntime/operators.h"
#include "onnxruntime/vectorised.h"

namespace megalodon::ort {
namespace {

constexpr int64_t kGrain = 4096;  // scalars that are worth a thread

struct Moments {
    double mean, var;
};

/// Mean and population variance of `size` scalars. Distances from the first keep float32 exact for a large mean.
MGD_VECTORISED Moments token_moments(const float* x, int64_t size) {
    const float pivot = x[0];
    float sum = 0;
    for (int64_t i = 0; i < size; ++i)
        sum += x[i] - pivot;
    const float shift = sum / static_cast<float>(size);
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; ++i) {
        const float distance = x[i] - pivot - shift;
        squares += distance * distance;
    }
    return {static_cast<double>(pivot) + shift, static_cast<double>(squares / static_cast<float>(size))};
}

/// One token more: n tokens were seen before it.
Moments update(const Moments& past, const Moments& token, double n) {
    const double delta = token.mean - past.mean;
    const double mean = past.mean + delta / (n + 1);
    return {mean, (n * past.var + token.var + delta * delta * n / (n + 1)) / (n + 1)};
}

Moments load(const float* past) {
    return {static_cast<double>(past[kMeanHi]) + past[kMeanLo], static_cast<double>(past[kVarHi]) + past[kVarLo]};
}

void store(const Moments& moments, float* present) {
    present[kMeanHi] = static_cast<float>(moments.mean);
    present[kMeanLo] = static_cast<float>(moments.mean - present[kMeanHi]);
    present[kVarHi] = static_cast<float>(moments.var);
    present[kVarLo] = static_cast<float>(moments.var - present[kVarHi]);
}

struct Group {
    const float* x;
    float* y;
    const float *weight, *bias;
    int64_t size;
};

MGD_VECTORISED void normalise(const Moments& moments, float epsilon, const Group& group) {
    const auto mean_hi = static_cast<float>(moments.mean);
    const auto mean_lo = static_cast<float>(moments.mean - mean_hi);
    const auto scale = static_cast<float>(1 / std::sqrt(moments.var + static_cast<double>(epsilon)));
    for (int64_t i = 0; i < group.size; ++i) {
        group.y[i] = ((group.x[i] - mean_hi) - mean_lo) * scale * group.weight[i] + group.bias[i];
    }
}

}  // namespace

void timestep_norm(const Call& call, float epsilon) {
    const Tensor x = call.input(0), past = call.input(1), position = call.input(2), weight = call.input(3),
                 bias = call.input(4);
    Call::require(x.shape.size() == 3 && past.shape.size() == 3, "x [B, T, D] and past [B, G, 4]");
    const int64_t B = x.shape[0], T = x.shape[1], D = x.shape[2], G = past.shape[1];
    Call::require(T > 0 && G > 0 && D > 0 && D % G == 0 && past.size() == B * G * kNormParts && position.size() == B &&
                      weight.size() == D && bias.size() == D,
                  "weight and bias of D channels in G groups");
    const int64_t size = D / G;
    float* y = call.output(0, x.shape);
    float* present = call.output(1, past.shape);
    call.parallel(B * G, kGrain / (T * size), [&](int64_t begin, int64_t end) {
        for (int64_t row_group = begin; row_group < end; ++row_group) {
            const int64_t row = row_group / G, first = (row_group % G) * size;
            const auto seen = static_cast<double>(position.integers()[row]);
            Moments moments = seen == 0 ? Moments{0, 0} : load(past.floats() + row_group * kNormParts);
            for (int64_t t = 0; t < T; ++t) {
                const int64_t offset = (row * T + t) * D + first;
                moments = update(moments, token_moments(x.floats() + offset, size), seen + static_cast<double>(t));
                normalise(moments, epsilon,
                          {x.floats() + offset, y + offset, weight.floats() + first, bias.floats() + first, size});
            }
            store(moments, present + row_group * kNormParts);
        }
    });
}

}  // namespace megalodon::ort
