// The operators as functions of one call; inputs and outputs in the order of the ONNX operators, all float32 but for
// positions, the memory of ChunkAttention and the codes of QuantizedMatMul.
#pragma once

#include <memory>
#include <new>

#include "onnxruntime/call.h"
#include "onnxruntime/quantized_matmul.h"

namespace megalodon::ort {

void chunk_attention(const Call& call, int64_t chunk_size);
void complex_ema(const Call& call);
void timestep_norm(const Call& call, float epsilon);

/// A product with a constant matrix of codes, which it packs when it is made.
class QuantizedMatMul {
 public:
    QuantizedMatMul(const Tensor& codes, const Tensor& scales, int64_t block_size);
    void multiply(const Call& call) const;

 private:
    static constexpr std::align_val_t kAlignment{64};
    struct Deleter {
        void operator()(uint8_t* bytes) const { ::operator delete(bytes, kAlignment); }
    };

    PackedMatrix matrix_;
    std::unique_ptr<uint8_t, Deleter> bytes_;
};

}  // namespace megalodon::ort
