// QuantizedMatMul on the CPU: packing when the session opens; checks of a call, and its parts on several threads.

#include "onnxruntime/quantized_matmul.h"

#include "onnxruntime/operators.h"

namespace megalodon::ort {
namespace {

constexpr int64_t kTilesOfPart = 4, kRowsOfPart = 16;

/// What is packed of these, without memory for it.
PackedMatrix check_matrix(const Tensor& codes, const Tensor& scales, int64_t block_size) {
    Call::require(codes.shape.size() == 2 && (codes.type == kInt8 || codes.type == kInt4),
                  "codes [K, N] of int8 or int4");
    const int64_t K = codes.shape[0], N = codes.shape[1], block = block_size ? block_size : K;
    const bool four_bits = codes.type == kInt4;
    Call::require(K > 0 && N > 0 && (!four_bits || N % 2 == 0), "a matrix, of an even number of columns where of int4");
    Call::require(block == K || (block % kSpan == 0 && K % block == 0),
                  "whole columns, or blocks of a multiple of 32 that divides them");
    Call::require(scales.size() == K / block * N, "a scale for each block");
    return {nullptr, K, N, block, four_bits};
}

}  // namespace

QuantizedMatMul::QuantizedMatMul(const Tensor& codes, const Tensor& scales, int64_t block_size) {
    matrix_ = check_matrix(codes, scales, block_size);
    matrix_.bytes = static_cast<uint8_t*>(::operator new(matrix_.num_bytes(), kAlignment));
    bytes_.reset(matrix_.bytes);
    pack(codes.data, scales.floats(), matrix_);
}

void QuantizedMatMul::multiply(const Call& call) const {
    const Tensor x = call.input(0);
    Call::require(!x.shape.empty() && x.shape.back() == matrix_.K, "x [..., K]");
    std::vector<int64_t> shape = x.shape;
    shape.back() = matrix_.N;
    const int64_t M = x.size() / matrix_.K;
    float* y = call.output(0, shape);

    std::vector<int8_t> codes(M * matrix_.padded_K());
    std::vector<float> scales(M * matrix_.num_spans());
    std::vector<int32_t> offsets(M * matrix_.num_spans());
    const RoundedRows rounded{codes.data(), scales.data(), offsets.data()};
    call.parallel(M, kRowsOfPart, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
            round_row(matrix_, x.floats(), row, rounded);
    });
    call.parallel(matrix_.num_tiles(), kTilesOfPart,
                  [&](int64_t begin, int64_t end) { multiply_tiles(matrix_, rounded, M, begin, end, y); });
}

}  // namespace megalodon::ort
