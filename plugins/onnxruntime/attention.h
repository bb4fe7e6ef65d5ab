// What both ways through ChunkAttention share: the tensors of a call, rows of memory as float32, the exponential.
//
// Letters: B rows of the batch, H heads, T new and S past rows, dz and dv their widths as keys and as values.
#pragma once

#include <cmath>
#include <cstring>

#include "onnxruntime/call.h"
#include "onnxruntime/vectorised.h"

#define MGD_INLINE __attribute__((always_inline)) inline

namespace megalodon::ort {

/// An element of a row without its scale, stored as float32, int8, or the bits of fp8 e4m3.
MGD_INLINE float to_float(float value) {
    return value;
}
MGD_INLINE float to_float(int8_t code) {
    return code;
}
MGD_INLINE float to_float(uint8_t bits_e4m3) {
    // Exponent and fraction in their places of a float32, whose exponents start 120 lower; all ones are NaN.
    const uint32_t magnitude = bits_e4m3 & 0x7fu;
    const uint32_t bits = (bits_e4m3 & 0x80u) << 24 | (magnitude == 0x7fu ? 0x7fc00000u : magnitude << 20);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value * 0x1p120f;
}

/// Rows of keys or values of one head: float32, or int8 or fp8 e4m3 with a float32 scale for each row.
struct Rows {
    const void* data;
    const float* scales;  // null for float32
    ElementType type;
    int64_t width;

    /// Row `index` without its scale; `scratch` holds a row, which is written where the type is another.
    MGD_INLINE const float* row(int64_t index, float* scratch) const {
        if (type == kFloat) return static_cast<const float*>(data) + index * width;
        if (type == kInt8) return converted(static_cast<const int8_t*>(data) + index * width, scratch);
        return converted(static_cast<const uint8_t*>(data) + index * width, scratch);
    }
    MGD_INLINE float scale(int64_t index) const { return scales ? scales[index] : 1.0f; }

 private:
    template <typename Element>
    MGD_INLINE const float* converted(const Element* codes, float* scratch) const {
        for (int64_t i = 0; i < width; ++i)
            scratch[i] = to_float(codes[i]);
        return scratch;
    }
};

/// A call's tensors, and the rows of one head of one row of the batch.
struct Attention {
    const float *q, *k, *v;     // [B, H, T, dz], the same, [B, H, T, dv]
    Rows past_key, past_value;  // [B, H, S, dz], [B, H, S, dv]
    const int64_t* position;    // [B]
    float* out;                 // [B, H, T, dv]
    int64_t B, H, T, S, dz, dv, chunk_size;

    /// Past rows that the tokens of `head` (of B * H) see.
    int64_t filled(int64_t head) const { return position[head / H] % chunk_size; }
    Rows keys(int64_t head) const { return of_head(past_key, head); }
    Rows values(int64_t head) const { return of_head(past_value, head); }

 private:
    Rows of_head(const Rows& all, int64_t head) const {
        const int64_t bytes = all.type == kFloat ? 4 : 1;
        return {static_cast<const char*>(all.data) + head * S * all.width * bytes,
                all.scales ? all.scales + head * S : nullptr, all.type, all.width};
    }
};

/// e^x for x <= 0, to 2e-7 of itself and 0 below e^-87; NaN stays. Cody and Waite's reduction, Cephes' polynomial.
MGD_INLINE float exponential(float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: a float32 next to it has no fraction
    const float shifted = x * 1.44269504f + kRound;
    const float n = shifted - kRound;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23;  // 2^n
    float power;
    std::memcpy(&power, &bits, sizeof power);
    const float value = (p * r * r + r + 1.0f) * power;
    return x < -87.0f ? 0.0f : value;
}

void attend_one_token(const Call& call, const Attention& attention);
void attend_tokens(const Call& call, const Attention& attention);

}  // namespace megalodon::ort
