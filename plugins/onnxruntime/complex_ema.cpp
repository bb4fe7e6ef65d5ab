// ComplexEMA on the CPU: the recurrence itself, a channel's modes side by side in vector registers.

#include "onnxruntime/operators.h"
#include "onnxruntime/vectorised.h"

namespace megalodon::ort {
namespace {

constexpr int64_t kModes = 16;     // kept in registers together; more take several passes over the tokens
constexpr int64_t kGrain = 4096;   // modes times tokens that are worth a thread
constexpr int64_t kTokens = 64;    // copied side by side, since those of one channel lie far apart
constexpr int64_t kChannels = 16;  // that share a line of the cache

/// Modes of one channel.
struct Modes {
    const float *p, *q, *gamma;  // [n], [n, 2], [n, 2]
    const float* past;           // [n, 2]
    float* present;              // [n, 2]; may be `past`

    Modes from(int64_t n) const { return {p + n, q + 2 * n, gamma + 2 * n, past + 2 * n, present + 2 * n}; }
};

/// What one token adds to y, straight through memory: decoding is bound by reading the coefficients.
MGD_VECTORISED float step(const Modes& modes, int64_t num_modes, float u) {
    float sum = 0;
    for (int64_t n = 0; n < num_modes; ++n) {
        const float re =
            modes.q[2 * n] * modes.past[2 * n] - modes.q[2 * n + 1] * modes.past[2 * n + 1] + modes.p[n] * u;
        const float im = modes.q[2 * n] * modes.past[2 * n + 1] + modes.q[2 * n + 1] * modes.past[2 * n];
        modes.present[2 * n] = re;
        modes.present[2 * n + 1] = im;
        sum += modes.gamma[2 * n] * re - modes.gamma[2 * n + 1] * im;
    }
    return sum;
}

/// Takes x [T] through up to kModes modes, whose parts are added to y [T].
MGD_VECTORISED void run(const Modes& modes, int64_t num_modes, const float* x, float* y, int64_t num_tokens) {
    float re[kModes] = {}, im[kModes] = {}, p[kModes] = {};
    float qr[kModes] = {}, qi[kModes] = {}, gr[kModes] = {}, gi[kModes] = {};
    for (int64_t n = 0; n < num_modes; ++n) {
        re[n] = modes.past[2 * n], im[n] = modes.past[2 * n + 1], p[n] = modes.p[n];
        qr[n] = modes.q[2 * n], qi[n] = modes.q[2 * n + 1];
        gr[n] = modes.gamma[2 * n], gi[n] = modes.gamma[2 * n + 1];
    }
    for (int64_t t = 0; t < num_tokens; ++t) {
        float sum = 0;
        for (int64_t n = 0; n < kModes; ++n) {
            const float next = qr[n] * re[n] - qi[n] * im[n] + p[n] * x[t];
            im[n] = qr[n] * im[n] + qi[n] * re[n];
            re[n] = next;
            sum += gr[n] * re[n] - gi[n] * im[n];
        }
        y[t] += sum;
    }
    for (int64_t n = 0; n < num_modes; ++n)
        modes.present[2 * n] = re[n], modes.present[2 * n + 1] = im[n];
}

/// The tensors of a call.
struct Ema {
    const float *x, *past;               // [B, T, D], [B, D, N, 2]
    const int64_t* position;             // [B]
    const float *p, *q, *gamma, *omega;  // [D, N], [D, N, 2], [D, N, 2], [D]
    float *y, *present;                  // like x, like past
    int64_t B, T, D, N;
    const float* zeros;  // [N, 2]: the past of a fresh row

    Modes modes(int64_t row, int64_t d) const {
        const int64_t state = 2 * (row * D + d) * N;
        return {p + d * N, q + 2 * d * N, gamma + 2 * d * N, position[row] == 0 ? zeros : past + state,
                present + state};
    }
};

/// All tokens of a row through the channels from `begin` to `end`, kChannels at most.
void run_channels(const Ema& ema, int64_t row, int64_t begin, int64_t end) {
    float x[kChannels][kTokens], y[kChannels][kTokens];
    for (int64_t first = 0; first < ema.T; first += kTokens) {
        const int64_t count = std::min(kTokens, ema.T - first), place = (row * ema.T + first) * ema.D;
        for (int64_t t = 0; t < count; ++t) {
            for (int64_t d = begin; d < end; ++d)
                x[d - begin][t] = ema.x[place + t * ema.D + d];
        }
        for (int64_t d = begin; d < end; ++d) {
            const float* u = x[d - begin];
            float* out = y[d - begin];
            for (int64_t t = 0; t < count; ++t)
                out[t] = ema.omega[d] * u[t];
            Modes modes = ema.modes(row, d);
            if (first) modes.past = modes.present;
            for (int64_t n = 0; n < ema.N; n += kModes)
                run(modes.from(n), std::min(kModes, ema.N - n), u, out, count);
        }
        for (int64_t t = 0; t < count; ++t) {
            for (int64_t d = begin; d < end; ++d)
                ema.y[place + t * ema.D + d] = y[d - begin][t];
        }
    }
}

void step_channels(const Ema& ema, int64_t row, int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) {
        const float u = ema.x[row * ema.D + d];
        ema.y[row * ema.D + d] = step(ema.modes(row, d), ema.N, u) + ema.omega[d] * u;
    }
}

}  // namespace

void complex_ema(const Call& call) {
    const Tensor x = call.input(0), past = call.input(1), position = call.input(2), p = call.input(3),
                 powers = call.input(4), gamma = call.input(5), omega = call.input(6);
    Call::require(x.shape.size() == 3 && past.shape.size() == 4, "x [B, T, D] and past [B, D, N, 2]");
    const int64_t B = x.shape[0], T = x.shape[1], D = x.shape[2], N = past.shape[2];
    Call::require(T > 0 && N > 0 && past.size() == 2 * B * D * N && position.size() == B && p.size() == D * N &&
                      powers.size() >= 2 * D * N && gamma.size() == 2 * D * N && omega.size() == D,
                  "coefficients of D channels and N modes");
    float* y = call.output(0, x.shape);
    float* present = call.output(1, past.shape);
    const std::vector<float> zeros(static_cast<size_t>(N) * 2);
    const Ema ema{x.floats(),
                  past.floats(),
                  position.integers(),
                  p.floats(),
                  powers.floats(),
                  gamma.floats(),
                  omega.floats(),
                  y,
                  present,
                  B,
                  T,
                  D,
                  N,
                  zeros.data()};
    const int64_t groups = (D + kChannels - 1) / kChannels;
    call.parallel(B * groups, kGrain / (T * N * kChannels), [&](int64_t first, int64_t last) {
        for (int64_t group = first; group < last; ++group) {
            const int64_t begin = group % groups * kChannels, end = std::min(begin + kChannels, D);
            (T == 1 ? step_channels : run_channels)(ema, group / groups, begin, end);
        }
    });
}

}  // namespace megalodon::ort
