// Gradients of TimestepNorm.
//
// With r_t = (var_t + eps)^(-1/2), n_t the tokens after token t and c as in scan.cuh, y sends to mean_t and var_t
//     a_t = -r_t sum_s(grad w),    b_t = -r_t^2 / 2 sum_s(grad w xhat)
// (plus, at the last token, the gradients of the present state), and since n_t var_t is a sum of squares less
// n_t mean_t^2, the sums from the right R1 = sum a/n, R2 = sum b/n, R3 = sum b (mean - c)/n give
//     grad x = grad w r + (R1 - 2 R3 + 2 R2 (x - c)) / s,    grad mean_past = n (R1 - 2 R3),  grad var_past = n R2
// with x - c = xhat / r + (mean - c).
#pragma once

#include "operators/timestep_norm/normalise.cuh"
#include "operators/timestep_norm/scan.cuh"

namespace megalodon::timestep_norm {

/// Where the steps of the backward pass keep what they tell each other.
struct BackwardWorkspace {
    Normaliser* tokens;  // [B, G, T]: moments, then normalisers
    GradientSums* sums;  // [B, G, T]: a token's own sums, then what all later ones add to grad x: grad + grad_x xhat
    float* chunk_sums;   // [B * chunks, 2, D]: parts of grad_weight and grad_bias
};

/// The sums from the right of one group of one row, in place of `sums`.
__device__ inline void take_suffix(const TimestepNormBackwardCall& call, int64_t row, int64_t g, const Running& running,
                                   const Normaliser* tokens, GradientSums* sums, double* totals) {
    const TimestepNormInputs& in = call.in;
    const float* grad_present = call.grad_present + (row * in.G + g) * kNormParts;
    const double size = static_cast<double>(in.D / in.G);
    double right[3] = {0.0, 0.0, 0.0};  // R1, R2, R3
    for (int64_t first = 0; first < in.T; first += kTileTokens) {
        const int64_t start = in.T - 1 - first - static_cast<int64_t>(threadIdx.x) * kThreadTokens;  // and downwards
        double parts[kThreadTokens][3] = {}, sum[3] = {0.0, 0.0, 0.0};
#pragma unroll
        for (int k = 0; k < kThreadTokens; ++k) {
            const int64_t t = start - k;
            if (t < 0) continue;
            const Normaliser norm = tokens[t];
            const double r = norm.scale, n = running.past.count + static_cast<double>(t + 1);
            const bool is_last = t == in.T - 1;
            const double grad_mean = -r * sums[t].grad + (is_last ? grad_present[kMeanHi] : 0.0f);
            const double grad_var = -0.5 * r * r * sums[t].grad_x + (is_last ? grad_present[kVarHi] : 0.0f);
            parts[k][0] = grad_mean / n;
            parts[k][1] = grad_var / n;
            parts[k][2] = parts[k][1] * (mean_of(norm) - running.past.mean);
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                sum[i] += parts[k][i];
            }
        }
        scan_over_block(sum, right, totals);
#pragma unroll
        for (int k = 0; k < kThreadTokens; ++k) {
            const int64_t t = start - k;
            if (t < 0) continue;
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                sum[i] += parts[k][i];
            }
            const double offset = mean_of(tokens[t]) - running.past.mean;
            sums[t] = {static_cast<float>((sum[0] - 2.0 * sum[2] + 2.0 * sum[1] * offset) / size),
                       static_cast<float>(2.0 * sum[1] / (size * static_cast<double>(tokens[t].scale)))};
        }
    }
    if (threadIdx.x != 0) return;
    float* grad_past = call.grad_past + (row * in.G + g) * kNormParts;
    grad_past[kMeanHi] = grad_past[kMeanLo] = static_cast<float>(running.past.count * (right[0] - 2.0 * right[2]));
    grad_past[kVarHi] = grad_past[kVarLo] = static_cast<float>(running.past.count * right[1]);
}

/// Grid: one block of kScanThreads for each group of each row. At least one token.
__global__ void scan_gradients_kernel(TimestepNormBackwardCall call, BackwardWorkspace workspace) {
    MGD_SHARED(double, totals, kScanWarps * 3);
    const TimestepNormInputs& in = call.in;
    const int64_t row = blockIdx.x / in.G, g = blockIdx.x % in.G, index = workspace_index(in, row, g, 0);
    Normaliser* tokens = workspace.tokens + index;
    GradientSums* sums = workspace.sums + index;
    Running running{load_past(in, row, g)};
    for (int64_t first = 0; first < in.T; first += kTileTokens) {
        take_prefix_tile(running, tokens, first, in.T, totals,
                         [&](int64_t t, const Normaliser& token, const Moments& moments) {
                             const Normaliser norm = normaliser(moments, in.epsilon);
                             // of grad w (x - token mean) -> of grad w xhat
                             const auto shift = static_cast<float>(mean_of(token) - moments.mean);
                             sums[t].grad_x = norm.scale * fmaf(shift, sums[t].grad, sums[t].grad_x);
                             tokens[t] = norm;
                         });
    }
    __syncthreads();  // from here on threads read what others wrote
    take_suffix(call, row, g, running, tokens, sums, totals);
}

/// Without tokens the gradient of the past is that of the present. Grid: one thread for each group of each row.
__global__ void copy_gradients_kernel(TimestepNormBackwardCall call) {
    const int64_t index = thread_in_grid();
    if (index >= call.in.B * call.in.G) return;
    const bool is_fresh = call.in.position[index / call.in.G] == 0;
    const float* present = call.grad_present + index * kNormParts;
    float* past = call.grad_past + index * kNormParts;
    past[kMeanHi] = past[kMeanLo] = is_fresh ? 0.0f : present[kMeanHi];
    past[kVarHi] = past[kVarLo] = is_fresh ? 0.0f : present[kVarHi];
}

constexpr int kGradientTokens = 32;

/// Gradients of x, and of weight and bias from one chunk of tokens.
template <typename Activation, int kSize>
__global__ void gradients_kernel(TimestepNormBackwardCall call, BackwardWorkspace workspace) {
    using Pack = Packed<Activation, kSize>;
    const TimestepNormInputs& in = call.in;
    const Column column = column_of<kSize>(in, kGradientTokens);
    if (!column.is_inside) return;
    float weight[kSize], weight_sums[kSize] = {}, bias_sums[kSize] = {};
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        weight[i] = in.weight[column.channel + i];
    }
    const int64_t index = workspace_index(in, column.row, column.group, column.first_token);
    for (int64_t k = 0; k < column.num_tokens; ++k) {
        const int64_t offset = column.offset(in, k);
        const Pack x = *reinterpret_cast<const Pack*>(static_cast<const Activation*>(in.x) + offset);
        const Pack grad_y = *reinterpret_cast<const Pack*>(static_cast<const Activation*>(call.grad_y) + offset);
        const Normaliser norm = workspace.tokens[index + k];
        const GradientSums correction = workspace.sums[index + k];
        Pack grad_x;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            const float normalised = norm.apply(to_float(x.elements[i]), 1.0f, 0.0f),
                        grad = to_float(grad_y.elements[i]);
            weight_sums[i] = fmaf(grad, normalised, weight_sums[i]);
            bias_sums[i] += grad;
            const float rest = fmaf(correction.grad_x, normalised, correction.grad);
            grad_x.elements[i] = from_float<Activation>(fmaf(grad * weight[i], norm.scale, rest));
        }
        *reinterpret_cast<Pack*>(static_cast<Activation*>(call.grad_x) + offset) = grad_x;
    }
    const int64_t chunks = (in.T + kGradientTokens - 1) / kGradientTokens;
    float* sums = workspace.chunk_sums + (column.row * chunks + column.first_token / kGradientTokens) * 2 * in.D;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
        sums[column.channel + i] = weight_sums[i];
        sums[in.D + column.channel + i] = bias_sums[i];
    }
}

}  // namespace megalodon::timestep_norm
