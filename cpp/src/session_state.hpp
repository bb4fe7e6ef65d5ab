// What the handles of megalodon/session.hpp stand for. Streams hold their batch, batches their session; a batch knows
// its streams by address and is told when one goes.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "megalodon/session.hpp"
#include "saved_stream.hpp"
#include "slot_memory.hpp"

namespace megalodon::detail {

class SessionState {
 public:
    SessionState(Bundle bundle, std::unique_ptr<Engine> engine);

    const Manifest& manifest() const { return *manifest_; }
    const std::shared_ptr<const Manifest>& shared_manifest() const { return manifest_; }
    const Bundle& bundle() const { return bundle_; }
    Engine& engine() { return *engine_; }
    std::shared_ptr<const Tokenizer> tokenizer;  // none: tokens only

 private:
    Bundle bundle_;
    std::shared_ptr<const Manifest> manifest_;
    std::unique_ptr<Engine> engine_;
};

class StreamState;

class BatchState {
 public:
    BatchState(std::shared_ptr<SessionState> session, std::int64_t num_slots);

    SessionState& session() const { return *session_; }
    const std::shared_ptr<SessionState>& shared_session() const { return session_; }
    std::int64_t num_slots() const { return memory_.num_slots(); }
    std::int64_t num_free() const;

    // Takes a free slot for the stream, which gives it back with `retire`.
    std::int64_t admit(StreamState& stream, const SavedStream* saved);
    std::int64_t admit_copy(StreamState& stream, const StreamState& source);
    void retire(std::int64_t slot);
    TensorMap read(std::int64_t slot, std::int64_t position) const { return memory_.read(slot, position); }
    std::vector<float> logits(std::int64_t slot) const { return memory_.logits(slot); }

    struct Fed {
        StreamState* stream;
        std::vector<std::int64_t> tokens;  // not consumed yet
    };
    void feed(std::vector<Fed> waiting);

    struct Asked {
        StreamState* stream;
        SamplingParams params;
    };
    // The next token of each stream, pending from then on; none for a stream whose logits are not finite.
    std::vector<std::optional<std::int64_t>> choose(const std::vector<Asked>& asked);

 private:
    std::int64_t free_slot() const;
    std::vector<SlotRange> ranges(const std::vector<Fed>& waiting, std::int64_t length) const;
    void call(SlotRange range, std::int64_t length, const std::vector<Fed>& waiting);

    std::shared_ptr<SessionState> session_;
    SlotMemory memory_;
    std::vector<StreamState*> streams_;  // by slot; null: free
};

class StreamState {
 public:
    StreamState(std::shared_ptr<BatchState> batch, const SavedStream* saved);
    StreamState(std::shared_ptr<BatchState> batch, const StreamState& source);  // a copy in a slot of another batch
    ~StreamState();
    StreamState(const StreamState&) = delete;
    StreamState& operator=(const StreamState&) = delete;

    // Throws Error (state) when the stream was retired.
    BatchState& batch() const;
    SessionState& session() const { return batch_->session(); }
    void retire();

    std::int64_t slot() const { return slot_; }
    std::int64_t position() const { return position_; }
    bool is_fresh() const { return recent_.empty(); }
    bool has_pending() const { return pending_.has_value(); }
    bool has_logits() const { return has_logits_; }
    const std::vector<float>& logits() const;  // fetched when they are asked for
    std::vector<std::int64_t> recent() const;  // at most kHistoryTokens

    void feed(const std::vector<std::int64_t>& tokens);
    std::int64_t sample(const SamplingParams& params);
    SavedStream save() const;

    // For BatchState.
    void check(const std::vector<std::int64_t>& tokens) const;                // throws before anything is computed
    void check_choice(const SamplingParams& params) const;                    // likewise
    std::vector<std::int64_t> take(const std::vector<std::int64_t>& tokens);  // with the pending token before them
    void consumed(std::int64_t num_tokens);
    TokenChoice choice(const SamplingParams& params);
    void chosen(std::int64_t token);

 private:
    Generator& generator_for(const SamplingParams& params);
    void note(std::int64_t token);

    std::shared_ptr<BatchState> batch_;
    std::int64_t slot_ = -1;               // -1: retired
    std::int64_t position_ = 0;            // tokens consumed
    std::vector<std::int64_t> recent_;     // the last tokens, oldest first; kHistoryTokens of them at least
    std::optional<std::int64_t> pending_;  // a sampled token that is not consumed yet; it is the last of `recent_`
    bool has_logits_ = false;              // the last consumed token's are in the batch's memory
    mutable std::vector<float> logits_;    // a copy of them, or empty: not fetched yet
    std::optional<Generator> generator_;
};

}  // namespace megalodon::detail
