// Products of int8 with 4 or 8 bits by AVX-512 VNNI: four products of an unsigned and a signed byte, added to an int32.
//
// Every template and inline function that is compiled for these instructions has internal linkage: one that the linker
// could share with other files would carry them to processors that lack them.

#include "onnxruntime/quantized_matmul.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

namespace megalodon::ort {

bool has_vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

}  // namespace megalodon::ort

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")  // has_vnni() itself runs everywhere

namespace megalodon::ort {
namespace {

constexpr int kLanes = 16, kVectors = 4;  // int32 of a vector, vectors of a tile
constexpr int64_t kVectorBytes = 64;
constexpr int64_t kAhead = 4096;  // bytes between what is multiplied and what is asked for
constexpr int kRowsTogether = 4;

int64_t smaller(int64_t a, int64_t b) {  // the linker shares std::min
    return a < b ? a : b;
}

/// The first lanes of a vector, of as many as it has.
__attribute__((always_inline)) inline __mmask64 first(int64_t count) {
    return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << (count > 0 ? count : 0)) - 1;
}

/// Four rows of 64 bytes side by side: vector i has the columns 16 i to 16 i + 15.
__attribute__((always_inline)) inline void interleave(const __m512i (&rows)[4], __m512i (&columns)[kVectors]) {
    const __m512i low01 = _mm512_unpacklo_epi8(rows[0], rows[1]), high01 = _mm512_unpackhi_epi8(rows[0], rows[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(rows[2], rows[3]), high23 = _mm512_unpackhi_epi8(rows[2], rows[3]);
    // Lane l of part j: columns 16 l + 4 j to 16 l + 4 j + 3.
    const __m512i part0 = _mm512_unpacklo_epi16(low01, low23), part1 = _mm512_unpackhi_epi16(low01, low23);
    const __m512i part2 = _mm512_unpacklo_epi16(high01, high23), part3 = _mm512_unpackhi_epi16(high01, high23);
    const __m512i a = _mm512_shuffle_i32x4(part0, part1, 0x44), b = _mm512_shuffle_i32x4(part0, part1, 0xee);
    const __m512i c = _mm512_shuffle_i32x4(part2, part3, 0x44), d = _mm512_shuffle_i32x4(part2, part3, 0xee);
    columns[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    columns[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    columns[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    columns[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

/// 64 columns of one row as unsigned codes, a byte each; of a row of 4 bits that begins at `codes` in 32 bytes.
template <bool kFourBits>
__attribute__((always_inline)) inline __m512i read_codes(const uint8_t* codes, int64_t num_columns) {
    if constexpr (!kFourBits) {
        const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
        return _mm512_xor_si512(_mm512_maskz_loadu_epi8(first(num_columns), codes), sign);
    } else {
        const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x88)), half = _mm256_set1_epi8(0x0f);
        const __m256i pairs = _mm256_xor_si256(_mm256_maskz_loadu_epi8(first(num_columns / 2), codes), sign);
        const __m512i low = _mm512_cvtepu8_epi16(_mm256_and_si256(pairs, half));
        const __m512i high = _mm512_cvtepu8_epi16(_mm256_and_si256(_mm256_srli_epi16(pairs, 4), half));
        return _mm512_or_si512(low, _mm512_slli_epi16(high, 8));
    }
}

template <bool kFourBits>
void pack_quad(const uint8_t* const (&row_codes)[4], int64_t num_columns, uint8_t* quad) {
    __m512i rows[4], columns[kVectors];
    for (int i = 0; i < 4; ++i)
        rows[i] = read_codes<kFourBits>(row_codes[i], num_columns);
    interleave(rows, columns);
    for (int i = 0; i < kVectors; i += kFourBits ? 2 : 1) {
        const __m512i bytes =
            kFourBits ? _mm512_or_si512(columns[i], _mm512_slli_epi16(columns[i + 1], 4)) : columns[i];
        _mm512_store_si512(quad, bytes);
        quad += kVectorBytes;
    }
}

/// A block of one tile: `codes` and `scales` begin at its first column. Returns what follows it.
template <bool kFourBits>
uint8_t* pack_block(const uint8_t* codes, const float* scales, const PackedMatrix& packed, int64_t num_columns,
                    uint8_t* out) {
    const int64_t row_bytes = kFourBits ? packed.N / 2 : packed.N, last = packed.block - 1;
    for (int64_t k = 0; k <= last; k += 4, out += packed.quad_bytes()) {
        const uint8_t* rows[4];
        for (int i = 0; i < 4; ++i)
            rows[i] = codes + smaller(k + i, last) * row_bytes;  // x has a code of 0 beyond the last row
        pack_quad<kFourBits>(rows, num_columns, out);
    }
    for (int i = 0; i < kVectors; ++i, out += kVectorBytes)
        _mm512_store_ps(out, _mm512_maskz_loadu_ps(first(num_columns - i * kLanes), scales + i * kLanes));
    return out;
}

template <bool kFourBits>
void pack_tiles(const uint8_t* codes, const float* scales, const PackedMatrix& packed) {
    uint8_t* out = packed.bytes;
    for (int64_t column = 0; column < packed.N; column += kTileColumns) {
        for (int64_t block = 0; block < packed.num_blocks(); ++block) {
            const int64_t place = block * packed.block * packed.N + column;
            out = pack_block<kFourBits>(codes + (kFourBits ? place / 2 : place), scales + block * packed.N + column,
                                        packed, packed.N - column, out);
        }
    }
}

/// The vectors of a quad, a byte for each code.
template <bool kFourBits>
__attribute__((always_inline)) inline void read_quad(const uint8_t* quad, __m512i (&codes)[kVectors]) {
    for (int i = 0; i < (kFourBits ? 2 : 4); ++i) {
        const __m512i bytes = _mm512_load_si512(quad + i * kVectorBytes);
        _mm_prefetch(reinterpret_cast<const char*>(quad + i * kVectorBytes + kAhead), _MM_HINT_T0);
        if constexpr (kFourBits) {
            const __m512i half = _mm512_set1_epi8(0x0f);
            codes[2 * i] = _mm512_and_si512(bytes, half);
            codes[2 * i + 1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), half);
        } else {
            codes[i] = bytes;
        }
    }
}

/// Four elements of x, in each place of a vector.
__attribute__((always_inline)) inline __m512i broadcast_quad(const int8_t* codes) {
    int32_t four;
    __builtin_memcpy(&four, codes, sizeof four);
    return _mm512_set1_epi32(four);
}

template <int kRows>
struct Sums {
    __m512 of[kRows][kVectors];

    Sums() {
        for (auto& row : of) {
            for (__m512& vector : row)
                vector = _mm512_setzero_ps();
        }
    }
};

/// Adds the products of one span, rows k of the matrix from `begin` to `end`, to `sums`; returns what follows it.
template <bool kFourBits, int kRows>
__attribute__((always_inline)) inline const uint8_t* add_span(const PackedMatrix& matrix, const RoundedRows& x,
                                                              int64_t row, int64_t begin, int64_t end,
                                                              const uint8_t* bytes, Sums<kRows>& sums) {
    const int64_t num_spans = matrix.num_spans(), padded_K = matrix.padded_K(), span = begin / kSpan;
    constexpr int64_t quad_bytes = kTileColumns * (kFourBits ? 2 : 4);
    __m512i exact[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
        for (__m512i& vector : exact[r])
            vector = _mm512_set1_epi32(x.offsets[(row + r) * num_spans + span]);
    }
    for (int64_t k = begin; k < end; k += 4, bytes += quad_bytes) {
        __m512i codes[kVectors];
        read_quad<kFourBits>(bytes, codes);
        for (int r = 0; r < kRows; ++r) {
            const __m512i four = broadcast_quad(x.codes + (row + r) * padded_K + k);
            for (int i = 0; i < kVectors; ++i)
                exact[r][i] = _mm512_dpbusd_epi32(exact[r][i], codes[i], four);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        const __m512 scale = _mm512_set1_ps(x.scales[(row + r) * num_spans + span]);
        for (int i = 0; i < kVectors; ++i)
            sums.of[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[r][i]), scale, sums.of[r][i]);
    }
    return bytes;
}

/// y = x W for `kRows` rows of x from `row` on, in one tile.
template <bool kFourBits, int kRows>
void multiply_tile(const PackedMatrix& matrix, const RoundedRows& x, int64_t row, int64_t tile, float* y) {
    const uint8_t* bytes = matrix.bytes + tile * matrix.tile_bytes();
    const int64_t column = tile * kTileColumns;
    Sums<kRows> totals;
    for (int64_t block = 0; block < matrix.K; block += matrix.block) {
        const int64_t block_end = block + matrix.block;
        Sums<kRows> sums;
        for (int64_t begin = block; begin < block_end; begin += kSpan)
            bytes = add_span<kFourBits>(matrix, x, row, begin, smaller(begin + kSpan, block_end), bytes, sums);
        for (int i = 0; i < kVectors; ++i, bytes += kVectorBytes) {
            const __m512 scales = _mm512_load_ps(bytes);
            for (int r = 0; r < kRows; ++r)
                totals.of[r][i] = _mm512_fmadd_ps(sums.of[r][i], scales, totals.of[r][i]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kVectors; ++i) {
            const int64_t n = column + i * kLanes;
            _mm512_mask_storeu_ps(y + (row + r) * matrix.N + n, first(matrix.N - n), totals.of[r][i]);
        }
    }
}

template <bool kFourBits>
void multiply(const PackedMatrix& matrix, const RoundedRows& x, int64_t M, int64_t begin, int64_t end, float* y) {
    for (int64_t tile = begin; tile < end; ++tile) {
        int64_t row = 0;
        for (; row + kRowsTogether <= M; row += kRowsTogether)
            multiply_tile<kFourBits, kRowsTogether>(matrix, x, row, tile, y);
        for (; row < M; ++row)
            multiply_tile<kFourBits, 1>(matrix, x, row, tile, y);
    }
}

/// x's scale of a span, and what its elements are multiplied with.
struct SpanScale {
    float scale, factor;
};

SpanScale scale_of(const float* x, int64_t count) {
    __m512 largest = _mm512_setzero_ps(), not_finite = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k += kLanes) {
        const __m512 values = _mm512_maskz_loadu_ps(first(count - k), x + k);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(values));
        not_finite = _mm512_fmadd_ps(values, _mm512_setzero_ps(), not_finite);  // 0, or NaN
    }
    const float most = _mm512_reduce_max_ps(largest);
    // NaN and infinities make all products of their span NaN; too little to divide by makes them 0.
    return {most / 127.0f + _mm512_reduce_add_ps(not_finite), most < 1e-36f ? 0.0f : 127.0f / most};
}

}  // namespace

void pack(const void* codes, const float* scales, const PackedMatrix& packed) {
    const auto pack_any = packed.four_bits ? pack_tiles<true> : pack_tiles<false>;
    pack_any(static_cast<const uint8_t*>(codes), scales, packed);
}

void round_row(const PackedMatrix& matrix, const float* x, int64_t row, const RoundedRows& rounded) {
    const uint32_t excess = matrix.four_bits ? 8 : 128;
    int8_t* codes = rounded.codes + row * matrix.padded_K();
    for (int64_t span = 0; span < matrix.num_spans(); ++span) {
        const int64_t start = span * kSpan, count = smaller(matrix.K - start, kSpan);
        const float* values = x + row * matrix.K + start;
        const SpanScale scale = scale_of(values, count);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = 0; k < count; k += kLanes) {
            const __m512 scaled =
                _mm512_mul_ps(_mm512_maskz_loadu_ps(first(count - k), values + k), _mm512_set1_ps(scale.factor));
            const __m512i whole = _mm512_cvtps_epi32(scaled);
            _mm512_mask_cvtsepi32_storeu_epi8(codes + start + k, first(count - k), whole);
            sum = _mm512_add_epi32(sum, whole);
        }
        const int64_t place = row * matrix.num_spans() + span;
        rounded.scales[place] = scale.scale;
        // Unsigned, which may overflow: a sum of what is not finite is anything.
        rounded.offsets[place] = static_cast<int32_t>(-excess * static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)));
    }
}

void multiply_tiles(const PackedMatrix& matrix, const RoundedRows& x, int64_t M, int64_t begin, int64_t end, float* y) {
    const auto multiply_any = matrix.four_bits ? multiply<true> : multiply<false>;
    multiply_any(matrix, x, M, begin, end, y);
}

}  // namespace megalodon::ort

#else

namespace megalodon::ort {

bool has_vnni() {
    return false;
}
void pack(const void*, const float*, const PackedMatrix&) {}
void round_row(const PackedMatrix&, const float*, int64_t, const RoundedRows&) {}
void multiply_tiles(const PackedMatrix&, const RoundedRows&, int64_t, int64_t, int64_t, float*) {}

}  // namespace megalodon::ort

#endif
