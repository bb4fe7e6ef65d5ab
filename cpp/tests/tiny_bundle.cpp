#include "tiny_bundle.hpp"

#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "files.hpp"
#include "formats.hpp"

namespace megalodon::test {

namespace {

using Json = nlohmann::json;

Json state_row(const std::string& past, const std::string& present, const Json& past_shape, const Json& present_shape,
               const std::string& dtype) {
    return {{"past", past},
            {"present", present},
            {"past_shape", past_shape},
            {"present_shape", present_shape},
            {"dtype", dtype}};
}

// Two heads, rows of different width and of none, as the scales of quantised rows are, whole tensors of rank 2 and 4.
Json state_table() {
    return {
        state_row("past_key.0", "new_key.0", {"B", 2, "S", 3}, {"B", 2, "T", 3}, "activation"),
        state_row("past_value.0", "new_value.0", {"B", 2, "S", 5}, {"B", 2, "T", 5}, "activation"),
        state_row("past_table.0", "new_table.0", {"B", 2, "S"}, {"B", 2, "T"}, "float32"),
        state_row("past_cema.0", "present_cema.0", {"B", 4, 2, 2}, {"B", 4, 2, 2}, "float32"),
        state_row("past_norm.final", "present_norm.final", {"B", 3}, {"B", 3}, "float32"),
    };
}

}  // namespace

TemporaryDirectory::TemporaryDirectory() {
    std::string pattern = (std::filesystem::temp_directory_path() / "megalodon-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw Error(ErrorKind::io, "no temporary directory");
    path_ = pattern;
}

TemporaryDirectory::~TemporaryDirectory() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
}

void write_text(const std::filesystem::path& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
}

std::string manifest_text(const TinyModel& model) {
    // The hashes of "graph" and "weights".
    const char* graph_hash = "eef93e1d14482804277fca0172464032d1a4fdbcc338524059fa1e861454ad4d";
    const char* weights_hash = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c";
    const Json document = {
        {"format", kBundleFormat},
        {"format_version", kBundleFormatVersion},
        {"name", "tiny"},
        {"fingerprint", model.fingerprint},
        {"model_fingerprint", "m" + model.fingerprint},
        {"config", {{"vocab_size", model.vocab_size}, {"chunk_size", model.chunk_size}}},
        {"precision", model.precision},
        {"logits", model.returns_all_logits ? "all" : "last"},
        {"attention", "standard"},
        {"tokenizer", {{"kind", "bytes"}, {"file", nullptr}, {"stop_tokens", {10}}}},
        {"state", state_table()},
        {"files",
         {{kModelFile, {{"sha256", graph_hash}, {"size_bytes", 5}}},
          {kWeightsFile, {{"sha256", weights_hash}, {"size_bytes", 7}}}}},
    };
    return document.dump(2);
}

void write_bundle(const std::filesystem::path& directory, const TinyModel& model) {
    write_text(directory / kManifestFile, manifest_text(model));
    write_text(directory / kModelFile, "graph");
    write_text(directory / kWeightsFile, "weights");
}

Json engine_json(const std::string& id) {
    return {
        {"format_version", kEngineInfoVersion},
        {"id", id},
        {"flavour", "tensorrt-rtx"},
        {"version", "1.7.1.116"},
        {"compute_capabilities", {80, 89}},
        {"hardware_compatible", false},
        {"version_compatible", false},
        {"weights", "engine"},
        {"plugins", {"TimestepNorm"}},
        {"bundle_weights", Json::object()},
        {"max_batch", 4},
        {"profile", {{"tokens", {{"min", {1, 1}}, {"opt", {4, 1}}, {"max", {4, 12}}}}}},
        {"norm_update", "float64"},
        {"bundle_fingerprint", TinyModel().fingerprint},
        {"engine", {{"sha256", "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"}, {"size_bytes", 7}}},
        {"plugin_library", {{"name", "libmegalodon.so"}, {"abi_version", 2}, {"sha256", "0"}}}};
}

Bundle tiny_bundle(const TinyModel& model) {
    const TemporaryDirectory directory;
    write_bundle(directory.path(), model);
    return Bundle::open(directory.path());
}

}  // namespace megalodon::test
