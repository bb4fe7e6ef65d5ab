#include "convert.hpp"

#include <cmath>
#include <cstring>

#include "half.hpp"

namespace megalodon::detail {

namespace {

float load(const std::byte* data, DType dtype) {
    if (dtype == DType::float32) {
        float value;
        std::memcpy(&value, data, sizeof value);
        return value;
    }
    std::uint16_t value;
    std::memcpy(&value, data, sizeof value);
    return dtype == DType::float16 ? from_float16(value) : from_bfloat16(value);
}

void store(std::byte* data, DType dtype, float value) {
    if (dtype == DType::float32) {
        std::memcpy(data, &value, sizeof value);
        return;
    }
    const std::uint16_t narrow = dtype == DType::float16 ? to_float16(value) : to_bfloat16(value);
    std::memcpy(data, &narrow, sizeof narrow);
}

}  // namespace

bool is_floating(DType dtype) {
    return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

bool is_finite(const HostTensor& tensor) {
    if (tensor.dtype == DType::float8_e4m3) {
        for (const std::byte value : tensor.data) {
            if ((value & std::byte{0x7f}) == std::byte{0x7f}) return false;  // its only NaN; there is no infinity
        }
        return true;
    }
    if (!is_floating(tensor.dtype)) return true;
    const std::size_t size = byte_size(tensor.dtype);
    for (std::size_t offset = 0; offset < tensor.data.size(); offset += size) {
        if (!std::isfinite(load(&tensor.data[offset], tensor.dtype))) return false;
    }
    return true;
}

HostTensor cast(const HostTensor& tensor, DType dtype, const std::string& what) {
    if (tensor.dtype == dtype) return tensor;
    if (!is_floating(tensor.dtype) || !is_floating(dtype)) {
        throw Error(ErrorKind::state, what + " is " + name_of(tensor.dtype) + ", expected " + name_of(dtype));
    }
    HostTensor result{dtype, tensor.shape, {}};
    const auto count = static_cast<std::size_t>(num_elements(tensor.shape));
    result.data.resize(count * byte_size(dtype));
    for (std::size_t index = 0; index < count; ++index) {
        const float value = load(&tensor.data[index * byte_size(tensor.dtype)], tensor.dtype);
        store(&result.data[index * byte_size(dtype)], dtype, value);
    }
    if (!is_finite(result)) {
        throw Error(ErrorKind::state,
                    what + " in " + name_of(dtype) + " holds NaN or infinity: the stream is broken; start a new one");
    }
    return result;
}

}  // namespace megalodon::detail
