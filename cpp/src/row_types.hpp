// Key and value rows from one type to another, when a saved stream resumes in another export of its model. The
// arithmetic is that of megalodon_deploy/runtime/row_types.py.
#pragma once

#include <string>

#include "megalodon/bundle.hpp"
#include "megalodon/tensor.hpp"

namespace megalodon::detail {

// Whether an export may keep this tensor in 8 bits: keys and values.
bool is_convertible(const StateSpec& spec);

// The name of the scales that quantised rows have beside them: past_key.0 -> past_key_scale.0
std::string scale_name(const std::string& past);

bool is_quantised(DType dtype);  // int8 or float8

// The type in which a stream's tensors hold keys and values; float32 for every floating type.
DType type_of_rows(const TensorMap& tensors, const Manifest& manifest);

// All tensors as the bundle wants them. Throws Error (state), starting with `what`, when a number is too large.
TensorMap convert_rows(const TensorMap& tensors, const Manifest& manifest, const std::string& what);

}  // namespace megalodon::detail
