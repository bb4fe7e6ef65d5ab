// Element types, and tensors in main memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "megalodon/error.hpp"

namespace megalodon {

enum class DType { float32, float16, bfloat16, float8_e4m3, int8, uint8, int64, uint64 };

MEGALODON_API std::size_t byte_size(DType dtype);
MEGALODON_API const char* name_of(DType dtype);  // as numpy writes it: "float32"

using Shape = std::vector<std::int64_t>;

// Throws Error (invalid_argument) beyond 2^60.
MEGALODON_API std::int64_t num_elements(const Shape& shape);

// Dense, row-major.
struct HostTensor {
    DType dtype = DType::float32;
    Shape shape;
    std::vector<std::byte> data;
};

using TensorMap = std::map<std::string, HostTensor>;

}  // namespace megalodon
