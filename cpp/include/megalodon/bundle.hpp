// A bundle: the directory that `megalodon-deploy export` writes.
//
// Letters in shapes: B rows (streams), T tokens of a call, S rows of key/value memory that the caller holds.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "megalodon/tensor.hpp"

namespace megalodon {

// Axes without a fixed length, in StateSpec's shapes.
enum : std::int64_t { kBatchAxis = -1, kTokensAxis = -2, kCapacityAxis = -3 };

// One recurrent tensor, as the manifest's state table has it. A call returns either the whole tensor, or, where the
// past has an axis S, the new rows [.., T, ..] that its caller writes at position mod C.
struct StateSpec {
    std::string past;     // input name
    std::string present;  // output name
    Shape past_shape;
    Shape present_shape;
    DType dtype = DType::float32;
    bool is_activation = false;  // has the model's activation type; a saved stream may hold another floating type

    bool is_appended() const;
    std::int64_t rows_outer() const;  // of an appended tensor: elements of the axes between B and S (heads)
    std::int64_t rows_inner() const;  // and of those after S (width)
};

// A shape with numbers for its letters.
MEGALODON_API Shape concrete_shape(const Shape& shape, std::int64_t batch, std::int64_t tokens, std::int64_t capacity);

enum class TokenizerKind { bytes, tokenizer_json, sentencepiece, none };

struct FileEntry {
    std::string sha256;
    std::uint64_t size_bytes = 0;
};

// What manifest.json says, as far as running needs it.
struct Manifest {
    std::string name;
    std::string fingerprint;        // which bundle this is: configuration, precision and weights
    std::string model_fingerprint;  // which checkpoint it was exported from
    std::string precision;          // fp32, fp16 or bf16
    std::string attention;          // standard or plugin: what its engines compute it with, unless built otherwise
    DType activation = DType::float32;
    bool returns_all_logits = false;  // logits of all T positions, or of the last one
    std::int64_t vocab_size = 0;      // V
    std::int64_t chunk_size = 0;      // C
    TokenizerKind tokenizer = TokenizerKind::none;
    std::string tokenizer_file;
    std::vector<std::int64_t> stop_tokens;
    std::vector<StateSpec> state;  // in the graph's order
    std::map<std::string, FileEntry> files;
};

// An opened bundle: manifest checked, files there with the stated sizes. Immutable; any thread may read it.
class MEGALODON_API Bundle {
 public:
    // `verify_hashes` reads every file. Throws Error (bundle) naming the file.
    static Bundle open(const std::filesystem::path& path, bool verify_hashes = false);

    const std::filesystem::path& path() const { return path_; }
    const Manifest& manifest() const { return manifest_; }
    // The graph that ONNX Runtime opens on a CPU: the bundle may have one of its own for that.
    std::filesystem::path cpu_model_path() const;

 private:
    Bundle(std::filesystem::path path, Manifest manifest);

    std::filesystem::path path_;
    Manifest manifest_;
};

}  // namespace megalodon
