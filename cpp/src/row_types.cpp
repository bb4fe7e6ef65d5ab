#include "row_types.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "convert.hpp"
#include "formats.hpp"
#include "half.hpp"

namespace megalodon::detail {

namespace {

// Rows as float32.
HostTensor dequantised(const HostTensor& codes, const HostTensor& scales) {
    HostTensor result{DType::float32, codes.shape, std::vector<std::byte>(codes.data.size() * sizeof(float))};
    const std::size_t width = static_cast<std::size_t>(codes.shape.back());
    for (std::size_t index = 0; index < codes.data.size(); ++index) {
        const auto code = std::to_integer<std::uint8_t>(codes.data[index]);
        float scale;
        std::memcpy(&scale, &scales.data[index / width * sizeof scale], sizeof scale);
        const float number =
            codes.dtype == DType::int8 ? static_cast<float>(static_cast<std::int8_t>(code)) : from_float8(code);
        const float value = number * scale;
        std::memcpy(&result.data[index * sizeof value], &value, sizeof value);
    }
    return result;
}

struct Quantised {
    HostTensor codes, scales;
};

Quantised quantised(const HostTensor& rows, DType dtype) {
    const float largest = dtype == DType::int8 ? kLargestInt8 : kLargestFp8;
    const std::size_t width = static_cast<std::size_t>(rows.shape.back());
    std::vector<float> values(rows.data.size() / sizeof(float));
    if (!values.empty()) std::memcpy(values.data(), rows.data.data(), rows.data.size());
    Quantised result{{dtype, rows.shape, std::vector<std::byte>(values.size())},
                     {DType::float32, Shape(rows.shape.begin(), rows.shape.end() - 1), {}}};
    result.scales.data.resize(values.size() / width * sizeof(float));
    for (std::size_t row = 0; row < values.size() / width; ++row) {
        float magnitude = 0.0f;
        for (std::size_t index = 0; index < width; ++index) {
            magnitude = std::max(magnitude, std::fabs(values[row * width + index]));
        }
        const float scale = std::max(magnitude / largest, kSmallestRowScale);
        std::memcpy(&result.scales.data[row * sizeof scale], &scale, sizeof scale);
        for (std::size_t index = row * width; index < (row + 1) * width; ++index) {
            const float scaled = std::min(std::max(values[index] / scale, -largest), largest);
            result.codes.data[index] = dtype == DType::int8 ? std::byte(static_cast<std::uint8_t>(std::lrint(scaled)))
                                                            : std::byte{to_float8(scaled)};
        }
    }
    return result;
}

}  // namespace

bool is_convertible(const StateSpec& spec) {
    return spec.is_appended() && (spec.is_activation || is_quantised(spec.dtype));
}

std::string scale_name(const std::string& past) {
    const std::size_t dot = std::min(past.find('.'), past.size());
    return past.substr(0, dot) + "_scale" + past.substr(dot);
}

bool is_quantised(DType dtype) {
    return dtype == DType::int8 || dtype == DType::float8_e4m3;
}

DType type_of_rows(const TensorMap& tensors, const Manifest& manifest) {
    for (const StateSpec& spec : manifest.state) {
        const auto found = tensors.find(spec.past);
        if (!is_convertible(spec) || found == tensors.end()) continue;
        return is_quantised(found->second.dtype) ? found->second.dtype : DType::float32;
    }
    return DType::float32;
}

TensorMap convert_rows(const TensorMap& tensors, const Manifest& manifest, const std::string& what) {
    const DType kept = type_of_rows(tensors, manifest);
    TensorMap converted;
    for (const StateSpec& spec : manifest.state) {
        const auto found = tensors.find(spec.past);
        if (!is_convertible(spec)) {  // the scales of rows that were not quantised are made below
            if (found != tensors.end()) converted.emplace(*found);
            continue;
        }
        if (is_quantised(kept) && spec.dtype == kept) {
            converted.emplace(*found);
            continue;
        }
        HostTensor rows = found->second;
        if (is_quantised(kept)) rows = dequantised(rows, tensors.at(scale_name(spec.past)));
        if (!is_quantised(spec.dtype)) {
            converted[spec.past] = cast(rows, spec.dtype, what + ": " + spec.past);
            continue;
        }
        Quantised result = quantised(cast(rows, DType::float32, what + ": " + spec.past), spec.dtype);
        converted[spec.past] = std::move(result.codes);
        converted[scale_name(spec.past)] = std::move(result.scales);
    }
    return converted;
}

}  // namespace megalodon::detail
