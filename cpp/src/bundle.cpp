#include "megalodon/bundle.hpp"

#include <nlohmann/json.hpp>
#include <utility>

#include "files.hpp"
#include "formats.hpp"

namespace megalodon {

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr char kExportAgain[] = "; export the checkpoint again";

// What is wrong with a manifest; the path is added where it is known.
struct Malformed {
    std::string what;
};

const Json& at(const Json& object, const char* key) {
    if (!object.is_object() || !object.contains(key)) throw Malformed{std::string("key '") + key + "' is missing"};
    return object.at(key);
}

std::string text_at(const Json& object, const char* key) {
    const Json& value = at(object, key);
    if (!value.is_string()) throw Malformed{std::string(key) + " is not a string"};
    return value.get<std::string>();
}

std::int64_t positive_at(const Json& object, const char* key) {
    const Json& value = at(object, key);
    if (!value.is_number_integer() || value.get<std::int64_t>() < 1) {
        throw Malformed{std::string(key) + " = " + value.dump() + " is not a positive integer"};
    }
    return value.get<std::int64_t>();
}

// A path of a manifest never leaves the bundle.
std::string inside(const std::string& text) {
    const fs::path path(text);
    bool leaves = text.empty() || path.is_absolute() || text.find('\\') != std::string::npos;
    for (const fs::path& part : path)
        leaves = leaves || part == "..";
    if (leaves) throw Malformed{"path '" + text + "' leaves the bundle"};
    return text;
}

DType activation_of(const std::string& precision) {
    if (precision == "fp32") return DType::float32;
    if (precision == "fp16") return DType::float16;
    if (precision == "bf16") return DType::bfloat16;
    throw Malformed{"precision '" + precision + "' is none of fp32, fp16, bf16"};
}

DType dtype_of(const std::string& name, DType activation) {
    if (name == "activation") return activation;
    if (name == "float32") return DType::float32;
    if (name == "fp8") return DType::float8_e4m3;
    if (name == "int8") return DType::int8;
    throw Malformed{"state: dtype '" + name + "' is not known to this release"};
}

Shape shape_of(const Json& axes, const char* what) {
    if (!axes.is_array() || axes.empty()) throw Malformed{std::string("state: ") + what + " is not a list"};
    Shape shape;
    for (const Json& axis : axes) {
        if (axis == "B") {
            shape.push_back(kBatchAxis);
        } else if (axis == "T") {
            shape.push_back(kTokensAxis);
        } else if (axis == "S") {
            shape.push_back(kCapacityAxis);
        } else if (axis.is_number_integer() && axis.get<std::int64_t>() > 0) {
            shape.push_back(axis.get<std::int64_t>());
        } else {
            throw Malformed{std::string("state: ") + what + " has an axis " + axis.dump()};
        }
    }
    return shape;
}

// Exactly what the runtime knows how to keep: whole tensors, or rows along S that come back along T.
void check_layout(const StateSpec& spec) {
    Shape expected = spec.past_shape;
    int num_letters = 0;
    for (std::int64_t& axis : expected) {
        if (axis < 0) ++num_letters;
        if (axis == kCapacityAxis) axis = kTokensAxis;
    }
    const bool is_known = spec.past_shape.front() == kBatchAxis && num_letters == (spec.is_appended() ? 2 : 1) &&
                          spec.present_shape == expected;
    if (!is_known) throw Malformed{"state: the shapes of " + spec.past + " are not known to this release"};
}

StateSpec state_spec(const Json& row, DType activation) {
    StateSpec spec;
    spec.past = text_at(row, "past");
    spec.present = text_at(row, "present");
    spec.past_shape = shape_of(at(row, "past_shape"), "past_shape");
    spec.present_shape = shape_of(at(row, "present_shape"), "present_shape");
    const std::string dtype = text_at(row, "dtype");
    spec.dtype = dtype_of(dtype, activation);
    spec.is_activation = dtype == "activation";
    check_layout(spec);
    return spec;
}

TokenizerKind tokenizer_kind(const std::string& name) {
    if (name == "bytes") return TokenizerKind::bytes;
    if (name == "tokenizer.json") return TokenizerKind::tokenizer_json;
    if (name == "sentencepiece") return TokenizerKind::sentencepiece;
    if (name == "none") return TokenizerKind::none;
    throw Malformed{"tokenizer '" + name + "' is not known to this release"};
}

void read_tokenizer(const Json& values, Manifest& manifest) {
    manifest.tokenizer = tokenizer_kind(text_at(values, "kind"));
    const Json& file = at(values, "file");
    if (file.is_string()) manifest.tokenizer_file = inside(file.get<std::string>());
    for (const Json& token : at(values, "stop_tokens")) {
        if (!token.is_number_integer()) throw Malformed{"tokenizer: stop token " + token.dump() + " is not an integer"};
        manifest.stop_tokens.push_back(token.get<std::int64_t>());
    }
}

void read_files(const Json& files, Manifest& manifest) {
    if (!files.is_object()) throw Malformed{"files is not an object"};
    for (const auto& [path, entry] : files.items()) {
        const Json& size = at(entry, "size_bytes");
        if (!size.is_number_unsigned()) throw Malformed{path + ": size_bytes is not an integer"};
        manifest.files[inside(path)] = {text_at(entry, "sha256"), size.get<std::uint64_t>()};
    }
    for (const char* needed : {kModelFile, kWeightsFile}) {
        if (manifest.files.count(needed) == 0) throw Malformed{std::string(needed) + " is not listed in its files"};
    }
}

Manifest parse(const std::string& text) {
    const Json document = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (document.is_discarded()) throw Malformed{std::string("not JSON") + kExportAgain};
    if (!document.is_object() || !document.contains("format") || document["format"] != kBundleFormat) {
        throw Malformed{std::string("not a manifest of a ") + kBundleFormat};
    }
    const Json& version = at(document, "format_version");
    if (version != kBundleFormatVersion) {
        throw Malformed{"format version " + version.dump() + ", this release reads " +
                        std::to_string(kBundleFormatVersion) + kExportAgain};
    }
    Manifest manifest;
    manifest.name = text_at(document, "name");
    manifest.fingerprint = text_at(document, "fingerprint");
    manifest.model_fingerprint = text_at(document, "model_fingerprint");
    manifest.precision = text_at(document, "precision");
    manifest.attention = text_at(document, "attention");
    manifest.activation = activation_of(manifest.precision);
    manifest.returns_all_logits = text_at(document, "logits") == "all";
    manifest.vocab_size = positive_at(at(document, "config"), "vocab_size");
    manifest.chunk_size = positive_at(at(document, "config"), "chunk_size");
    read_tokenizer(at(document, "tokenizer"), manifest);
    for (const Json& row : at(document, "state"))
        manifest.state.push_back(state_spec(row, manifest.activation));
    read_files(at(document, "files"), manifest);
    return manifest;
}

Manifest read_manifest(const fs::path& path) {
    try {
        return parse(detail::read_text(path));
    } catch (const Malformed& error) {
        throw Error(ErrorKind::bundle, path.string() + ": " + error.what);
    } catch (const Json::exception& error) {
        throw Error(ErrorKind::bundle, path.string() + ": " + error.what() + kExportAgain);
    }
}

void check_size(const fs::path& path, std::uint64_t expected) {
    std::error_code error;
    const std::uint64_t found = fs::file_size(path, error);
    if (error) throw Error(ErrorKind::bundle, path.string() + " is missing; export or copy the bundle again");
    if (found != expected) {
        throw Error(ErrorKind::bundle, path.string() + " has " + std::to_string(found) + " bytes, manifest says " +
                                           std::to_string(expected) + "; copy it again");
    }
}

}  // namespace

bool StateSpec::is_appended() const {
    for (const std::int64_t axis : past_shape) {
        if (axis == kCapacityAxis) return true;
    }
    return false;
}

std::int64_t StateSpec::rows_outer() const {
    std::int64_t count = 1;
    for (std::size_t axis = 1; past_shape[axis] != kCapacityAxis; ++axis)
        count *= past_shape[axis];
    return count;
}

std::int64_t StateSpec::rows_inner() const {
    std::int64_t count = 1;
    for (std::size_t axis = past_shape.size() - 1; past_shape[axis] != kCapacityAxis; --axis)
        count *= past_shape[axis];
    return count;
}

Shape concrete_shape(const Shape& shape, std::int64_t batch, std::int64_t tokens, std::int64_t capacity) {
    Shape result = shape;
    for (std::int64_t& axis : result) {
        if (axis == kBatchAxis) axis = batch;
        if (axis == kTokensAxis) axis = tokens;
        if (axis == kCapacityAxis) axis = capacity;
    }
    return result;
}

Bundle::Bundle(fs::path path, Manifest manifest) : path_(std::move(path)), manifest_(std::move(manifest)) {}

Bundle Bundle::open(const fs::path& path, bool verify_hashes) {
    const fs::path manifest_path = path / kManifestFile;
    std::error_code error;
    if (!fs::is_regular_file(manifest_path, error)) {
        throw Error(ErrorKind::bundle, path.string() + " is not a bundle: it has no " + kManifestFile +
                                           "; make one with `megalodon-deploy export`");
    }
    Bundle bundle(path, read_manifest(manifest_path));
    for (const auto& [relative, entry] : bundle.manifest_.files)
        check_size(path / relative, entry.size_bytes);
    if (!verify_hashes) return bundle;
    for (const auto& [relative, entry] : bundle.manifest_.files) {
        const std::string found = detail::sha256_file(path / relative);
        if (found != entry.sha256) {
            throw Error(ErrorKind::bundle, (path / relative).string() + ": sha256 is " + found.substr(0, 12) +
                                               "..., manifest says " + entry.sha256.substr(0, 12) +
                                               "...; the file is damaged: export or copy it again");
        }
    }
    return bundle;
}

fs::path Bundle::cpu_model_path() const {
    return path_ / (manifest_.files.count(kCpuModelFile) ? kCpuModelFile : kModelFile);
}

}  // namespace megalodon
