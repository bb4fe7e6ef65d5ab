// ComplexEMA on the CPU: the recurrence itself, a channel's modes side by side in vector registers.

#include "onnxruntime/operators.h"
#include "onnxruntime/vectorised.h"

namespace megalodon::ort {
namespace {

constexpr int64_t kModes = 16;    // kept in registers together; more take several passes over the tokens
constexpr int64_t kGrain = 4096;  // modes times tokens that are worth a thread

struct Channel {
    const float *past, *p, *q, *gamma;  // [n, 2], [n], [n, 2], [n, 2]
    float* present;                     // [n, 2]
    const float* x;                     // [T] with stride D, and so y
    float* y;
    int64_t num_tokens, stride;
    float omega;

    Channel from(int64_t n) const {
        return {past + 2 * n, p + n, q + 2 * n, gamma + 2 * n, present + 2 * n, x, y, num_tokens, stride, omega};
    }
};

/// One token, straight through memory: decoding is bound by reading the coefficients.
MGD_VECTORISED void step(const Channel& c, int64_t num_modes) {
    const float u = *c.x;
    float sum = 0;
    for (int64_t n = 0; n < num_modes; ++n) {
        const float re = c.q[2 * n] * c.past[2 * n] - c.q[2 * n + 1] * c.past[2 * n + 1] + c.p[n] * u;
        const float im = c.q[2 * n] * c.past[2 * n + 1] + c.q[2 * n + 1] * c.past[2 * n];
        c.present[2 * n] = re;
        c.present[2 * n + 1] = im;
        sum += c.gamma[2 * n] * re - c.gamma[2 * n + 1] * im;
    }
    *c.y = sum + c.omega * u;
}

/// All tokens for up to kModes modes, whose parts are added to y.
MGD_VECTORISED void run(const Channel& c, int64_t num_modes) {
    float re[kModes] = {}, im[kModes] = {}, p[kModes] = {};
    float qr[kModes] = {}, qi[kModes] = {}, gr[kModes] = {}, gi[kModes] = {};
    for (int64_t n = 0; n < num_modes; ++n) {
        re[n] = c.past[2 * n], im[n] = c.past[2 * n + 1], p[n] = c.p[n];
        qr[n] = c.q[2 * n], qi[n] = c.q[2 * n + 1];
        gr[n] = c.gamma[2 * n], gi[n] = c.gamma[2 * n + 1];
    }
    for (int64_t t = 0; t < c.num_tokens; ++t) {
        const float u = c.x[t * c.stride];
        float sum = 0;
        for (int64_t n = 0; n < kModes; ++n) {
            const float next = qr[n] * re[n] - qi[n] * im[n] + p[n] * u;
            im[n] = qr[n] * im[n] + qi[n] * re[n];
            re[n] = next;
            sum += gr[n] * re[n] - gi[n] * im[n];
        }
        c.y[t * c.stride] += sum;
    }
    for (int64_t n = 0; n < num_modes; ++n)
        c.present[2 * n] = re[n], c.present[2 * n + 1] = im[n];
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
    const std::vector<float> zeros(static_cast<size_t>(N) * 2);  // the past of a fresh row
    call.parallel(B * D, kGrain / (T * N), [&](int64_t begin, int64_t end) {
        for (int64_t row_channel = begin; row_channel < end; ++row_channel) {
            const int64_t row = row_channel / D, d = row_channel % D, first = row * T * D + d, state = row_channel * N;
            const bool is_fresh = position.integers()[row] == 0;
            Channel channel{is_fresh ? zeros.data() : past.floats() + 2 * state,
                            p.floats() + d * N,
                            powers.floats() + 2 * d * N,
                            gamma.floats() + 2 * d * N,
                            present + 2 * state,
                            x.floats() + first,
                            y + first,
                            T,
                            D,
                            omega.floats()[d]};
            if (T == 1) {
                step(channel, N);
                continue;
            }
            for (int64_t t = 0; t < T; ++t)
                channel.y[t * D] = channel.omega * channel.x[t * D];
            for (int64_t n = 0; n < N; n += kModes)
                run(channel.from(n), std::min(kModes, N - n));
        }
    });
}

}  // namespace megalodon::ort
