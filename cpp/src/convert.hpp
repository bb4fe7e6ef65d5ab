// Casts between floating element types, and checks for NaN and infinity.
#pragma once

#include <string>

#include "megalodon/tensor.hpp"

namespace megalodon::detail {

bool is_floating(DType dtype);  // float32, float16 or bfloat16

bool is_finite(const HostTensor& tensor);  // true for integers

// Throws Error (state), starting with `what`, when a value does not fit.
HostTensor cast(const HostTensor& tensor, DType dtype, const std::string& what);

}  // namespace megalodon::detail
