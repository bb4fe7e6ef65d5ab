#include "megalodon/tensor.hpp"

namespace megalodon {

namespace {

constexpr std::int64_t kMaxElements = std::int64_t{1} << 60;  // so that bytes fit in 64 bits too

}  // namespace

std::size_t byte_size(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return 4;
        case DType::float16:
        case DType::bfloat16:
            return 2;
        case DType::float8_e4m3:
        case DType::int8:
        case DType::uint8:
            return 1;
        case DType::int64:
        case DType::uint64:
            return 8;
    }
    throw Error(ErrorKind::internal, "Bug: unknown element type");
}

const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return "float32";
        case DType::float16:
            return "float16";
        case DType::bfloat16:
            return "bfloat16";
        case DType::float8_e4m3:
            return "float8_e4m3fn";
        case DType::int8:
            return "int8";
        case DType::uint8:
            return "uint8";
        case DType::int64:
            return "int64";
        case DType::uint64:
            return "uint64";
    }
    throw Error(ErrorKind::internal, "Bug: unknown element type");
}

std::int64_t num_elements(const Shape& shape) {
    std::int64_t count = 1;
    for (const std::int64_t axis : shape) {
        if (axis > 0 && count > kMaxElements / axis) {
            throw Error(ErrorKind::invalid_argument, "a tensor of more than 2^60 elements; use fewer slots");
        }
        count *= axis;
    }
    return count;
}

}  // namespace megalodon
