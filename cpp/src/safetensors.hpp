// The safetensors format: eight bytes of header length, a JSON header, then the tensors, without gaps.
#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "megalodon/tensor.hpp"

namespace megalodon::detail {

struct SafetensorsFile {
    TensorMap tensors;
    std::map<std::string, std::string> metadata;
};

// Throws Error (state) for a file that is not whole.
SafetensorsFile read_safetensors(const std::filesystem::path& path);

// Whole or not at all. Throws Error (io).
void write_safetensors(const std::filesystem::path& path, const SafetensorsFile& file);

}  // namespace megalodon::detail
