// The operators as functions of one call; inputs and outputs in the order of the ONNX operators, all float32.
#pragma once

#include "onnxruntime/call.h"

namespace megalodon::ort {

void complex_ema(const Call& call);
void timestep_norm(const Call& call, float epsilon);

}  // namespace megalodon::ort
