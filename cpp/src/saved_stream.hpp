// A stream's state in a file, or in memory on its way from one stream to another. The format is that of
// megalodon_deploy/runtime/saved_stream.py.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "megalodon/bundle.hpp"
#include "megalodon/sampling.hpp"
#include "megalodon/tensor.hpp"

namespace megalodon::detail {

// Everything that a stream is, apart from the bundle it belongs to.
struct SavedStream {
    std::shared_ptr<const Manifest> manifest;  // of the bundle that it is checked against
    std::string fingerprint;                   // of the bundle that it comes from
    std::string model_fingerprint;             // of the checkpoint behind that, "" when it is not known
    std::int64_t position = 0;
    TensorMap tensors;  // state of one row, by `past_*` name
    std::vector<std::int64_t> recent;
    std::optional<std::int64_t> pending;
    std::vector<float> logits;  // [V], or empty: at position 0 and while a token is pending
    std::optional<Generator> generator;
};

// Throws Error (state) when the stream has gone non-finite, Error (io) when the file cannot be written.
void write_saved_stream(const SavedStream& saved, const std::filesystem::path& path);

// Throws Error (state) naming file, tensor, found and expected.
SavedStream read_saved_stream(const std::filesystem::path& path, std::shared_ptr<const Manifest> manifest);

// Throws Error (state) unless the bundle or the model that the stream comes from is this one.
void check_origin(const SavedStream& saved, const Manifest& manifest, const std::string& where);

}  // namespace megalodon::detail
