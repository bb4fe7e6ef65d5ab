#include "saved_stream.hpp"

#include <cstring>
#include <set>

#include "convert.hpp"
#include "formats.hpp"
#include "megalodon/state_layout.h"
#include "row_types.hpp"
#include "safetensors.hpp"

namespace megalodon::detail {

namespace {

constexpr char kSaveAgain[] = "; save the stream again";

[[noreturn]] void fail(const std::string& where, const std::string& what) {
    throw Error(ErrorKind::state, where + ": " + what);
}

template <typename T>
HostTensor vector_tensor(DType dtype, const std::vector<T>& values) {
    HostTensor tensor{dtype, {static_cast<std::int64_t>(values.size())}, {}};
    tensor.data.resize(values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(tensor.data.data(), values.data(), tensor.data.size());
    return tensor;
}

// fp8 is saved as its bits: not every reader of the format knows the type. No tensor of the state is made of bytes.
TensorMap retyped(TensorMap tensors, DType from, DType to) {
    for (auto& [name, tensor] : tensors) {
        if (tensor.dtype == from) tensor.dtype = to;
    }
    return tensors;
}

template <typename T>
std::vector<T> values_of(const HostTensor& tensor) {
    std::vector<T> values(tensor.data.size() / sizeof(T));
    if (!values.empty()) std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
    return values;
}

std::string text_of(const Shape& shape) {
    std::string text = "[";
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
        text += (axis == 0 ? "" : ", ") + std::to_string(shape[axis]);
    }
    return text + "]";
}

HostTensor take(TensorMap& tensors, const char* name, const std::string& where) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) fail(where, std::string("tensor ") + name + " is missing" + kSaveAgain);
    HostTensor tensor = std::move(found->second);
    tensors.erase(found);
    return tensor;
}

template <typename T>
std::vector<T> take_integers(TensorMap& tensors, const char* name, DType dtype, std::int64_t most,
                             const std::string& where) {
    const HostTensor tensor = take(tensors, name, where);
    if (tensor.dtype != dtype || tensor.shape.size() != 1 || tensor.shape[0] > most) {
        fail(where, std::string(name) + " is " + name_of(tensor.dtype) + " " + text_of(tensor.shape) +
                        ", expected a vector of " + name_of(dtype) + " of length " + std::to_string(most) + " at most");
    }
    return values_of<T>(tensor);
}

void check_tensor(const HostTensor& tensor, const std::string& name, const Shape& shape, DType dtype, bool may_be_cast,
                  const std::string& where) {
    if (tensor.shape != shape) {
        fail(where, name + " has shape " + text_of(tensor.shape) + ", expected " + text_of(shape));
    }
    if (tensor.dtype != dtype && !(may_be_cast && is_floating(tensor.dtype))) {
        fail(where, name + " is " + name_of(tensor.dtype) + ", expected " + name_of(dtype));
    }
    if (!is_finite(tensor)) fail(where, name + " holds NaN or infinity: the stream is broken; start a new one");
}

void check_tokens(const SavedStream& saved, const std::string& where) {
    const std::int64_t vocab_size = saved.manifest->vocab_size;
    for (const std::int64_t token : saved.recent) {
        if (token < 0 || token >= vocab_size) {
            fail(where,
                 "token " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(vocab_size));
        }
    }
    if (saved.pending && (saved.recent.empty() || saved.recent.back() != *saved.pending)) {
        fail(where, std::string(kPendingTokens) + " is " + std::to_string(*saved.pending) +
                        ", which is not the last of " + kRecentTokens);
    }
}

// The tensors of the bundle's table, with key and value rows in the type that the stream has them in.
void check_state(const SavedStream& saved, const std::string& where) {
    const std::int64_t num_rows = saved.position % saved.manifest->chunk_size;
    const DType kept = type_of_rows(saved.tensors, *saved.manifest);
    std::set<std::string> known;
    const auto check_one = [&](const std::string& name, const Shape& shape, DType dtype, bool may_be_cast) {
        const auto found = saved.tensors.find(name);
        if (found == saved.tensors.end()) fail(where, "tensor " + name + " is missing");
        check_tensor(found->second, name, concrete_shape(shape, 1, 0, num_rows), dtype, may_be_cast, where);
        known.insert(name);
    };
    std::set<std::string> scales;
    for (const StateSpec& spec : saved.manifest->state) {
        if (!is_convertible(spec)) continue;
        check_one(spec.past, spec.past_shape, kept, !is_quantised(kept));
        scales.insert(scale_name(spec.past));
        const Shape scale_shape(spec.past_shape.begin(), spec.past_shape.end() - 1);
        if (is_quantised(kept)) check_one(scale_name(spec.past), scale_shape, DType::float32, false);
    }
    for (const StateSpec& spec : saved.manifest->state) {
        if (!is_convertible(spec) && scales.count(spec.past) == 0) {
            check_one(spec.past, spec.past_shape, spec.dtype, false);
        }
    }
    for (const auto& [name, tensor] : saved.tensors) {
        if (known.count(name) == 0) fail(where, "unknown tensor " + name + "; the file does not belong to this bundle");
    }
}

void check(const SavedStream& saved, const std::string& where) {
    if (saved.position < 0 || saved.position > kMaxPosition) {
        fail(where,
             "position is " + std::to_string(saved.position) + ", expected 0 to " + std::to_string(kMaxPosition));
    }
    check_tokens(saved, where);
    const bool has_logits = saved.position > 0 && !saved.pending;
    if (saved.logits.empty() == has_logits) {
        fail(where, std::string("tensor ") + kLogits + (has_logits ? " is missing" : " is not expected here"));
    }
    if (has_logits) {
        check_tensor(vector_tensor(DType::float32, saved.logits), kLogits, {saved.manifest->vocab_size}, DType::float32,
                     false, where);
    }
    check_state(saved, where);
}

void check_metadata(const SafetensorsFile& file, const char* key, const char* expected, const std::string& where) {
    const auto found = file.metadata.find(key);
    const std::string value = found == file.metadata.end() ? "missing" : "'" + found->second + "'";
    if (value != std::string("'") + expected + "'") {
        fail(where, std::string(key) + " is " + value + ", expected '" + expected + "'" + kSaveAgain);
    }
}

}  // namespace

void write_saved_stream(const SavedStream& saved, const std::filesystem::path& path) {
    check(saved, "the stream cannot be saved");
    SafetensorsFile file;
    file.tensors = retyped(saved.tensors, DType::float8_e4m3, DType::uint8);
    file.tensors[kPosition] = vector_tensor<std::int64_t>(DType::int64, {saved.position});
    file.tensors[kRecentTokens] = vector_tensor(DType::int64, saved.recent);
    std::vector<std::int64_t> pending;
    if (saved.pending) pending.push_back(*saved.pending);
    file.tensors[kPendingTokens] = vector_tensor(DType::int64, pending);
    file.tensors[kLogits] = vector_tensor(DType::float32, saved.logits);
    std::vector<std::uint64_t> generator;
    if (saved.generator) generator = {saved.generator->seed, saved.generator->draws};
    file.tensors[kGenerator] = vector_tensor(DType::uint64, generator);
    file.metadata = {{"format", kStreamFormat},
                     {"format_version", kStreamFormatVersion},
                     {"bundle_fingerprint", saved.fingerprint},
                     {"model_fingerprint", saved.model_fingerprint}};
    write_safetensors(path, file);
}

SavedStream read_saved_stream(const std::filesystem::path& path, std::shared_ptr<const Manifest> manifest) {
    const std::string where = path.string();
    SafetensorsFile file = read_safetensors(path);
    check_metadata(file, "format", kStreamFormat, where);
    check_metadata(file, "format_version", kStreamFormatVersion, where);
    SavedStream saved;
    saved.fingerprint = file.metadata["bundle_fingerprint"];
    saved.model_fingerprint = file.metadata["model_fingerprint"];
    check_origin(saved, *manifest, where);
    saved.manifest = std::move(manifest);
    const auto position = take_integers<std::int64_t>(file.tensors, kPosition, DType::int64, 1, where);
    if (position.size() != 1) fail(where, std::string(kPosition) + " is empty" + kSaveAgain);
    saved.position = position[0];
    saved.recent = take_integers<std::int64_t>(file.tensors, kRecentTokens, DType::int64, kHistoryTokens, where);
    const auto pending = take_integers<std::int64_t>(file.tensors, kPendingTokens, DType::int64, 1, where);
    if (!pending.empty()) saved.pending = pending[0];
    const auto generator = take_integers<std::uint64_t>(file.tensors, kGenerator, DType::uint64, 2, where);
    if (generator.size() == 1) fail(where, std::string(kGenerator) + " has length 1, expected 0 or 2" + kSaveAgain);
    if (generator.size() == 2) saved.generator = Generator{generator[0], generator[1]};
    const HostTensor logits = take(file.tensors, kLogits, where);
    if (logits.dtype != DType::float32 || logits.shape.size() != 1) {
        fail(where, std::string(kLogits) + " is not a vector of float32" + kSaveAgain);
    }
    saved.logits = values_of<float>(logits);
    saved.tensors = retyped(std::move(file.tensors), DType::uint8, DType::float8_e4m3);
    check(saved, where);
    return saved;
}

void check_origin(const SavedStream& saved, const Manifest& manifest, const std::string& where) {
    if (saved.fingerprint == manifest.fingerprint) return;
    if (!saved.model_fingerprint.empty() && saved.model_fingerprint == manifest.model_fingerprint) return;
    fail(where, "the stream comes from bundle " +
                    (saved.fingerprint.empty() ? "unknown" : saved.fingerprint.substr(0, 12)) +
                    " of another checkpoint, this bundle is " + manifest.fingerprint.substr(0, 12) +
                    "; resume it with an export of the checkpoint that it came from");
}

}  // namespace megalodon::detail
