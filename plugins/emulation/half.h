// CUDA's narrow floating-point types on the CPU: storage, and conversion to and from float, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

struct __nv_bfloat16 {
    uint16_t bits;
};

namespace megalodon::emulation {

inline uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

}  // namespace megalodon::emulation

inline float __bfloat162float(__nv_bfloat16 value) {
    return megalodon::emulation::bits_float(static_cast<uint32_t>(value.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16(float value) {
    const uint32_t bits = megalodon::emulation::float_bits(value);
    if (value != value) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float __half2float(__half value) {
    using namespace megalodon::emulation;
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Shifted into a float's fields, the exponent is too small by 127 - 15; subnormal numbers come out right as well.
    return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
}

inline __half __float2half(float value) {
    using namespace megalodon::emulation;
    const uint32_t sign = float_bits(value) >> 16 & 0x8000;
    const float magnitude = bits_float(float_bits(value) & 0x7fffffff);
    if (value != value) return {0x7fff};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (magnitude < 0x1p-14f) {  // subnormal: adding 0.5 leaves the multiple of 2^-24 in the last bits
        return {static_cast<uint16_t>(sign | (float_bits(magnitude + 0.5f) - float_bits(0.5f)))};
    }
    const uint32_t bits = float_bits(magnitude) - (112u << 23);
    return {static_cast<uint16_t>(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13)};
}

/// 1 sign, 4 exponent and 3 mantissa bits: largest number 448, no infinity.
struct __nv_fp8_e4m3 {
    uint8_t __x;
};

enum __nv_fp8_interpretation_t { __NV_E4M3 };

struct __half2_raw {
    uint16_t x, y;
};

inline __half __ushort_as_half(uint16_t bits) {
    return {bits};
}

/// Two numbers at once, the lower one in the lower byte; every one of them is a __half number.
inline __half2_raw __nv_cvt_fp8x2_to_halfraw2(uint16_t pair, __nv_fp8_interpretation_t) {
    using namespace megalodon::emulation;
    const auto to_half = [](unsigned byte) -> uint16_t {
        const unsigned sign = (byte & 0x80) << 8, magnitude = byte & 0x7f;
        if (magnitude == 0x7f) return 0x7fff;
        // In float's fields the exponent is too small by 127 - 7; subnormal numbers come out right as well.
        return sign | __float2half(bits_float(magnitude << 20) * 0x1p120f).bits;
    };
    return {to_half(pair & 0xff), to_half(pair >> 8)};
}
