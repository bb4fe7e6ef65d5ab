// float16, bfloat16 and float8 (e4m3 without infinities) in software, rounded to nearest even as NumPy and ml_dtypes
// do.
#pragma once

#include <cstdint>
#include <cstring>

namespace megalodon::detail {

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint16_t to_float16(float value) {
    const std::uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits_of(value) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);   // NaN
    if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and more: infinity
    if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the float16 subnormal in the low bits, rounded
        const float shifted = float_of(magnitude) + 0.5f;
        return static_cast<std::uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
    }
    const std::uint32_t is_odd = (magnitude >> 13) & 1u;
    return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + is_odd) >> 13));
}

inline float from_float16(std::uint16_t half) {
    const std::uint32_t sign = (half & 0x8000u) << 16;
    const std::uint32_t exponent = (half >> 10) & 0x1fu;
    const std::uint32_t mantissa = half & 0x3ffu;
    if (exponent == 0x1f) return float_of(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0) {
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline std::uint16_t to_bfloat16(float value) {
    const std::uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // NaN
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// For magnitudes up to 448, the largest there is.
inline std::uint8_t to_float8(float value) {
    const std::uint32_t sign = (bits_of(value) >> 24) & 0x80u;
    const std::uint32_t magnitude = bits_of(value) & 0x7fffffffu;
    if (magnitude < 0x3c800000u) {  // below 2^-6: adding 2^14 leaves the multiple of 2^-9 in the low bits, rounded
        const float shifted = float_of(magnitude) + 0x1p14f;
        return static_cast<std::uint8_t>(sign | (bits_of(shifted) - bits_of(0x1p14f)));
    }
    const std::uint32_t is_odd = (magnitude >> 20) & 1u;
    return static_cast<std::uint8_t>(sign | ((magnitude - 0x3c000000u + 0x7ffffu + is_odd) >> 20));
}

inline float from_float8(std::uint8_t code) {
    const std::uint32_t exponent = (code >> 3) & 0xfu, mantissa = code & 7u;
    float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
    if (exponent > 0) magnitude = float_of(((exponent + 120) << 23) | (mantissa << 20));
    if ((code & 0x7fu) == 0x7fu) magnitude = float_of(0x7fc00000u);  // NaN
    return (code & 0x80u) != 0 ? -magnitude : magnitude;
}

inline float from_bfloat16(std::uint16_t value) {
    return float_of(static_cast<std::uint32_t>(value) << 16);
}

}  // namespace megalodon::detail
