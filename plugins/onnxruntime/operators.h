// The operators as functions of one call; inputs and outputs in the order of the ONNX operators, all float32 but for
// positions and the memory of ChunkAttention.
#pragma once

#include "onnxruntime/call.h"

namespace megalodon::ort {

void chunk_attention(const Call& call, int64_t chunk_size);
void complex_ema(const Call& call);
void timestep_norm(const Call& call, float epsilon);

}  // namespace megalodon::ort
