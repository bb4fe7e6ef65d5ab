// The state of several streams in an engine's memory, and calls of the graph over a range of them.
//
// Letters as in megalodon/bundle.hpp. A slot is a row of every state tensor. Whole tensors, and the logits, exist
// twice: a call reads one half and writes the other, and then they change places. Rows of the open chunk exist once, in
// a capacity S that follows the longest stream (or is C, where the engine wants fixed shapes): the call returns the new
// rows, which are copied behind the old ones.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "megalodon/bundle.hpp"
#include "megalodon/engine.hpp"

namespace megalodon::detail {

// Memory of an engine.
class Buffer {
 public:
    Buffer() = default;
    Buffer(Engine& engine, std::size_t bytes)
        : engine_(&engine), data_(static_cast<std::byte*>(engine.allocate(bytes))) {}
    ~Buffer() { reset(); }
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    std::byte* data() const { return data_; }
    void swap(Buffer& other) noexcept {
        std::swap(engine_, other.engine_);
        std::swap(data_, other.data_);
    }

 private:
    void reset() noexcept {
        if (data_ != nullptr) engine_->release(data_);
    }
    Engine* engine_ = nullptr;
    std::byte* data_ = nullptr;
};

// A contiguous range of slots.
struct SlotRange {
    std::int64_t first, last;  // one past the last
    std::int64_t size() const { return last - first; }
};

class SlotMemory {
 public:
    SlotMemory(Engine& engine, const Manifest& manifest, std::int64_t num_slots);

    std::int64_t num_slots() const { return num_slots_; }

    // Feed `num_tokens` tokens to every slot of the range: tokens [b, T], positions [b]. No row may cross a chunk edge;
    // slots outside the range keep their state and their logits.
    void run(SlotRange range, const std::vector<std::int64_t>& tokens, const std::vector<std::int64_t>& positions,
             std::int64_t num_tokens);

    // What follows the last token that was fed to a slot: a copy of the logits [V], and the next token of each slot
    // whose choice (by slot) is wanted; kNoToken where nothing can be chosen.
    std::vector<float> logits(std::int64_t slot) const;
    std::vector<std::int64_t> choose(const std::vector<TokenChoice>& choices);

    TensorMap read(std::int64_t slot, std::int64_t position) const;  // a copy of one stream's state
    // `logits`: [V], or none where no token was consumed yet or one is pending.
    void write(std::int64_t slot, std::int64_t position, const TensorMap& tensors, const std::vector<float>& logits);
    // The state and logits of a stream of another memory of the same engine and model.
    void copy(std::int64_t slot, const SlotMemory& source, std::int64_t source_slot, std::int64_t position);

    // Forget the stream in a slot; memory is cleared only if that stream went non-finite.
    void retire(std::int64_t slot);

 private:
    // Key/value rows, or the like: [B, outer, S, inner].
    struct Appended {
        const StateSpec* spec;
        std::size_t outer;      // H, or the like
        std::size_t row_bytes;  // of one token
        Buffer memory;          // for a full chunk; its first bytes are laid out for `capacity_`
    };
    // A tensor that every call renews: [B, ...].
    struct Pair {
        const StateSpec* spec;  // null: the logits, of which a call has no past
        std::size_t slot_bytes;
        Buffer past, present;
    };
    // What a call needs besides the state.
    struct CallBuffers {
        Buffer tokens, position;
        Buffer all_logits;                       // of all positions, where a call of several tokens returns them
        std::vector<Buffer> new_rows;            // in the order of `appended_`
        std::int64_t batch = 0, num_tokens = 0;  // that there is room for
    };

    bool is_whole(SlotRange range) const { return range.size() == num_slots_; }
    void run_together(SlotRange range, const std::vector<std::int64_t>& tokens,
                      const std::vector<std::int64_t>& positions, std::int64_t num_tokens);
    void run_all(SlotRange range, const std::vector<std::int64_t>& tokens, const std::vector<std::int64_t>& positions);
    void run_apart(std::int64_t slot, const std::vector<std::int64_t>& tokens, std::int64_t position);
    CallBuffers make_buffers(std::int64_t batch, std::int64_t num_tokens);
    CallBuffers& step_buffers(std::int64_t batch);
    CallBuffers& piece_buffers(std::int64_t batch, std::int64_t num_tokens);
    StepPlan plan(SlotRange range, std::int64_t num_tokens, const CallBuffers& buffers) const;
    PreparedStep* prepared_step(const CallBuffers& buffers);
    void append(SlotRange range, const std::vector<std::int64_t>& positions, std::int64_t num_tokens,
                const CallBuffers& buffers);
    void renew(SlotRange range);
    void keep_last_logits(SlotRange range, std::int64_t num_tokens, const CallBuffers& buffers);
    void place(const std::map<std::int64_t, std::int64_t>& positions);
    void lay_out(std::int64_t capacity, std::int64_t kept_rows);
    std::int64_t longest() const;
    HostTensor read(const Pair& pair, std::int64_t slot) const;
    bool is_finite(std::int64_t slot) const;
    void clear(std::int64_t slot);
    std::byte* row_address(const Appended& tensor, std::int64_t slot, std::size_t head, std::int64_t row) const;
    const Pair& logits_pair() const { return pairs_.back(); }

    Engine& engine_;
    const Manifest& manifest_;
    std::int64_t num_slots_;
    std::int64_t capacity_ = 0;            // S
    std::vector<std::int64_t> positions_;  // tokens that each slot has consumed
    std::vector<Appended> appended_;
    std::vector<Pair> pairs_;                           // the logits last
    std::size_t half_ = 0;                              // how often the pairs have changed places, modulo 2
    std::map<std::int64_t, CallBuffers> step_buffers_;  // for calls of one token, by batch
    CallBuffers piece_;                                 // for calls of several tokens
    // Steps of all slots, by `half_`; none before the first, and where the engine prepares none.
    std::optional<std::unique_ptr<PreparedStep>> steps_[2];
    std::unique_ptr<SlotMemory> beside_;  // of one slot, for longer pieces of one of several slots
};

}  // namespace megalodon::detail
