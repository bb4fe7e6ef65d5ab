// Sessions and streams: a loaded model, and any number of token streams over it.
//
// Threads: a session with its batches and streams is used by one thread at a time (which may change). Different
// sessions are independent. Handles keep alive what they need, whatever the order of their destruction.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "megalodon/bundle.hpp"
#include "megalodon/engine.hpp"
#include "megalodon/sampling.hpp"
#include "megalodon/tokenizer.hpp"

namespace megalodon {

namespace detail {
class SessionState;
class BatchState;
class StreamState;
struct SavedStream;
}  // namespace detail

enum class Finish { none, length, stop_token, stop_string, callback };

// A generated token, and the text that it completes: whole characters; "" while one is unfinished or may begin a stop
// string.
struct GeneratedToken {
    std::int64_t token = 0;
    std::string text;
    Finish finish = Finish::none;  // why generation ends with this token
};

struct GenerateOptions {
    std::optional<std::int64_t> max_new_tokens = 256;  // none: until a stop
    SamplingParams sampling = SamplingParams::greedy();
    std::optional<std::vector<std::int64_t>> stop_tokens;  // none: those of the bundle's tokenizer
    std::vector<std::string> stop_strings;                 // the text ends before one
};

// Returns whether to go on. May throw: the stream stands behind the token that it was called with.
using TokenCallback = std::function<bool(const GeneratedToken&)>;

// A stream's whole state in memory; immutable.
class MEGALODON_API Snapshot {
 public:
    // Reads a file that any runtime saved. Throws Error (state) when it is damaged or belongs to another bundle.
    static Snapshot load(const std::filesystem::path& path, const Bundle& bundle);

    // Writes the file whole or not at all. Throws Error: state when the stream went non-finite, io.
    void save(const std::filesystem::path& path) const;

    // Handles of this kind share what they stand for; moving is copying, and leaves nothing empty behind.
    Snapshot(const Snapshot&) = default;
    Snapshot& operator=(const Snapshot&) = default;

 private:
    friend class Stream;
    friend class StreamBatch;
    explicit Snapshot(std::shared_ptr<const detail::SavedStream> saved);
    std::shared_ptr<const detail::SavedStream> saved_;
};

// One stream of tokens, in constant memory however long it runs. Destroying it frees its slot.
//
// After an Error of kind engine the stream is undefined: retire it, or resume from what was saved.
class MEGALODON_API Stream {
 public:
    Stream(Stream&&) noexcept;
    Stream& operator=(Stream&&) noexcept;
    ~Stream();

    std::int64_t position() const;             // tokens consumed
    const std::vector<float>& logits() const;  // [V] that follow the last consumed token

    // Consume tokens, a chunk at a time at most; returns the logits that follow, valid until the next call.
    const std::vector<float>& prefill(const std::vector<std::int64_t>& tokens);
    const std::vector<float>& step(std::int64_t token);

    // Choose the next token with the stream's own generator and history. It is consumed by the next call.
    std::int64_t sample(const SamplingParams& params);

    // Consume a prompt, then generate token by token. Without a prompt the stream goes on where it is.
    Finish generate(const std::vector<std::int64_t>& prompt, const GenerateOptions& options,
                    const TokenCallback& callback);
    // A text as prompt: encoded with the session's tokenizer.
    Finish generate(std::string_view prompt, const GenerateOptions& options, const TokenCallback& callback);

    Snapshot snapshot() const;
    void save(const std::filesystem::path& path) const;
    Stream fork() const;  // a second stream in this state, in memory of its own

 private:
    friend class Session;
    friend class StreamBatch;
    explicit Stream(std::unique_ptr<detail::StreamState> state);
    detail::StreamState& state() const;
    std::unique_ptr<detail::StreamState> state_;
};

// Tokens for one stream of a batch. None: its sampled token alone.
struct Feed {
    Stream* stream;
    std::vector<std::int64_t> tokens;
};

// A stream whose next token is wanted, and how it is chosen.
struct Sample {
    Stream* stream;
    SamplingParams params;
};

// Slots for streams that advance together, each at its own position. A slot needs no clearing between streams.
class MEGALODON_API StreamBatch {
 public:
    StreamBatch(const StreamBatch&) = default;  // as of Snapshot
    StreamBatch& operator=(const StreamBatch&) = default;

    std::int64_t num_slots() const;
    std::int64_t num_free() const;

    // Throws Error (invalid_argument) when all slots are taken.
    Stream admit();
    Stream admit(const Snapshot& snapshot);
    Stream admit(const std::filesystem::path& path);  // of a saved stream

    // Free a stream's slot now; the stream cannot be used any more.
    void retire(Stream& stream);

    // As few calls of the model as lengths and chunk edges allow; streams that are not named wait. Everything is
    // checked before anything is computed. Results: Stream::logits.
    void feed(const std::vector<Feed>& feeds);

    // Choose the next token of each of these streams, as Stream::sample does, where the logits lie; tokens that were
    // sampled before are consumed first, in one call. None: that stream went non-finite; the others go on.
    std::vector<std::optional<std::int64_t>> sample(const std::vector<Sample>& samples);

 private:
    friend class Session;
    // Checked: of this batch, and each named once.
    std::vector<detail::StreamState*> states(const std::vector<const Stream*>& streams) const;
    explicit StreamBatch(std::shared_ptr<detail::BatchState> state);
    std::shared_ptr<detail::BatchState> state_;
};

struct SessionOptions {
    std::string backend = "onnxruntime";  // or "tensorrt", "tensorrt-rtx"
    int threads = 0;                      // CPU threads of a call; 0: as many as the machine has cores
    int device = 0;                       // GPU number
    // Path of libonnxruntime.so, libnvinfer.so or libtensorrt_rtx.so, or of its directory. Empty: $ONNXRUNTIME_LIBRARY
    // or $TENSORRT_LIBRARY, else what the system's loader finds.
    std::string library;
    // TensorRT: path of libmegalodon.so. Empty: $MEGALODON_PLUGIN_LIBRARY, else what the system's loader finds.
    std::string plugin_library;
    // ONNX Runtime: path of libmegalodon_onnxruntime.so, the compiled operators. Empty: $MEGALODON_ONNXRUNTIME_LIBRARY,
    // else the standard operators in the graph.
    std::string operators_library;
};

// A bundle that is ready to stream.
class MEGALODON_API Session {
 public:
    // Throws Error: missing_library, engine, bundle, invalid_argument.
    explicit Session(const Bundle& bundle, const SessionOptions& options = {});
    Session(const Bundle& bundle, std::unique_ptr<Engine> engine);
    Session(const Session&) = default;  // as of Snapshot
    Session& operator=(const Session&) = default;

    const Bundle& bundle() const;
    const char* backend() const;
    void set_tokenizer(std::shared_ptr<const Tokenizer> tokenizer);

    Stream stream();  // fresh, in memory of its own
    Stream resume(const Snapshot& snapshot);
    Stream resume(const std::filesystem::path& path);
    StreamBatch batch(std::int64_t num_slots);

 private:
    std::shared_ptr<detail::SessionState> state_;
};

}  // namespace megalodon
