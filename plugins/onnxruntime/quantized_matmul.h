// A matrix of codes as the right factor: y = x W, W[k, n] = codes[k, n] * scales[k / block, n].
//
// A token reads every code once, so they are packed when the session opens, in the order in which they are multiplied:
// from then on each thread reads one stretch of memory from its beginning to its end. Rows of x are rounded to int8 at
// every call, as ONNX Runtime's MatMulNBits does at its accuracy level 4. Sums of products of codes are exact.
#pragma once

#include <cstdint>

namespace megalodon::ort {

constexpr int64_t kTileColumns = 64;
constexpr int64_t kSpan = 32;  // elements of x that share a scale

/// Packed: for each tile of columns and each block of rows, quads of rows and then the scales of the block's columns.
/// A quad is 64 columns of four rows, as unsigned codes (code + 8 or + 128), the four rows of a column side by side; of
/// 4 bits, columns 16 to 31 and 48 to 63 lie in the high halves of those before them. Beyond the matrix lies anything.
struct PackedMatrix {
    uint8_t* bytes;       // aligned to 64
    int64_t K, N, block;  // K is a multiple of block; block is K, or a multiple of kSpan
    bool four_bits;

    int64_t num_tiles() const { return (N + kTileColumns - 1) / kTileColumns; }
    int64_t num_blocks() const { return K / block; }
    int64_t num_spans() const { return (K + kSpan - 1) / kSpan; }
    int64_t padded_K() const { return (K + 3) / 4 * 4; }
    int64_t quad_bytes() const { return kTileColumns * (four_bits ? 2 : 4); }
    int64_t scale_bytes() const { return kTileColumns * static_cast<int64_t>(sizeof(float)); }
    int64_t tile_bytes() const { return padded_K() / 4 * quad_bytes() + num_blocks() * scale_bytes(); }
    int64_t num_bytes() const { return num_tiles() * tile_bytes(); }
};

/// Rows as codes of int8.
struct RoundedRows {
    int8_t* codes;     // [M, padded_K], 0 before they are written
    float* scales;     // [M, num_spans]
    int32_t* offsets;  // [M, num_spans]: what takes the excess of unsigned codes back
};

/// Whether this processor has the instructions of what follows: AVX-512 with VNNI.
bool has_vnni();

/// Writes `packed.num_bytes()` bytes from codes [K, N] and scales [K / block, N]. Codes are int8; or int4, two to a
/// byte with the first in the low half, N even.
void pack(const void* codes, const float* scales, const PackedMatrix& packed);

/// Rounds row `row` of x [M, K].
void round_row(const PackedMatrix& matrix, const float* x, int64_t row, const RoundedRows& rounded);

/// y [M, N] in the columns of the tiles from `begin` to `end`.
void multiply_tiles(const PackedMatrix& matrix, const RoundedRows& x, int64_t M, int64_t begin, int64_t end, float* y);

}  // namespace megalodon::ort
