#include <algorithm>

#include "choice.hpp"
#include "row_types.hpp"
#include "session_state.hpp"

namespace megalodon::detail {

SessionState::SessionState(Bundle bundle, std::unique_ptr<Engine> engine)
    : bundle_(std::move(bundle)),
      manifest_(std::make_shared<const Manifest>(bundle_.manifest())),
      engine_(std::move(engine)) {
    if (!engine_) throw Error(ErrorKind::invalid_argument, "the session was given no engine");
}

BatchState::BatchState(std::shared_ptr<SessionState> session, std::int64_t num_slots)
    : session_(std::move(session)),
      memory_(session_->engine(), session_->manifest(), num_slots),
      streams_(static_cast<std::size_t>(num_slots), nullptr) {}

std::int64_t BatchState::free_slot() const {
    const auto free = std::find(streams_.begin(), streams_.end(), nullptr);
    if (free != streams_.end()) return free - streams_.begin();
    throw Error(ErrorKind::invalid_argument,
                "all " + std::to_string(num_slots()) + " slots of the batch are taken; retire a stream first");
}

std::int64_t BatchState::num_free() const {
    return std::count(streams_.begin(), streams_.end(), nullptr);
}

std::int64_t BatchState::admit(StreamState& stream, const SavedStream* saved) {
    const std::int64_t slot = free_slot();
    if (saved != nullptr) {
        memory_.write(slot, saved->position, convert_rows(saved->tensors, session_->manifest(), "resumed stream"),
                      saved->logits);
    }
    streams_[static_cast<std::size_t>(slot)] = &stream;
    return slot;
}

std::int64_t BatchState::admit_copy(StreamState& stream, const StreamState& source) {
    const std::int64_t slot = free_slot();
    if (source.position() > 0) memory_.copy(slot, source.batch().memory_, source.slot(), source.position());
    streams_[static_cast<std::size_t>(slot)] = &stream;
    return slot;
}

void BatchState::retire(std::int64_t slot) {
    streams_[static_cast<std::size_t>(slot)] = nullptr;
    memory_.retire(slot);
}

void BatchState::feed(std::vector<Fed> waiting) {
    const std::int64_t chunk_size = session_->manifest().chunk_size;
    while (!waiting.empty()) {
        std::int64_t length = chunk_size;
        for (const Fed& fed : waiting) {
            const std::int64_t rows_left = chunk_size - fed.stream->position() % chunk_size;
            length = std::min({length, rows_left, static_cast<std::int64_t>(fed.tokens.size())});
        }
        for (const SlotRange range : ranges(waiting, length))
            call(range, length, waiting);
        for (Fed& fed : waiting)
            fed.tokens.erase(fed.tokens.begin(), fed.tokens.begin() + length);
        const auto is_done = [](const Fed& fed) { return fed.tokens.empty(); };
        waiting.erase(std::remove_if(waiting.begin(), waiting.end(), is_done), waiting.end());
    }
}

// The fewest contiguous ranges that hold every active slot and no stream that waits. In steps of one token free slots
// may lie between: they run as fresh streams, which their next stream takes no notice of. Longer pieces would cost time
// and rows for nobody.
std::vector<SlotRange> BatchState::ranges(const std::vector<Fed>& waiting, std::int64_t length) const {
    std::vector<bool> is_active(streams_.size(), false);
    for (const Fed& fed : waiting)
        is_active[static_cast<std::size_t>(fed.stream->slot())] = true;
    std::vector<SlotRange> found;
    bool is_open = false;
    for (std::int64_t slot = 0; slot < num_slots(); ++slot) {
        const auto index = static_cast<std::size_t>(slot);
        if (is_active[index]) {
            if (is_open) {
                found.back().last = slot + 1;
            } else {
                found.push_back({slot, slot + 1});
            }
            is_open = true;
        } else if (streams_[index] != nullptr || length > 1) {
            is_open = false;
        }
    }
    return found;
}

void BatchState::call(SlotRange range, std::int64_t length, const std::vector<Fed>& waiting) {
    const auto width = static_cast<std::size_t>(length);
    std::vector<std::int64_t> tokens(static_cast<std::size_t>(range.size()) * width, 0);
    std::vector<std::int64_t> positions(static_cast<std::size_t>(range.size()), 0);
    std::vector<const Fed*> rows(positions.size(), nullptr);
    for (const Fed& fed : waiting) {
        const std::int64_t slot = fed.stream->slot();
        if (slot < range.first || slot >= range.last) continue;
        const auto row = static_cast<std::size_t>(slot - range.first);
        rows[row] = &fed;
        positions[row] = fed.stream->position();
        std::copy_n(fed.tokens.begin(), width, tokens.begin() + static_cast<std::ptrdiff_t>(row * width));
    }
    memory_.run(range, tokens, positions, length);
    for (const Fed* row : rows) {
        if (row != nullptr) row->stream->consumed(length);
    }
}

std::vector<std::optional<std::int64_t>> BatchState::choose(const std::vector<Asked>& asked) {
    std::vector<Fed> pending;
    for (const Asked& one : asked) {
        if (one.stream->has_pending()) pending.push_back({one.stream, one.stream->take({})});
    }
    feed(std::move(pending));
    std::vector<TokenChoice> choices(streams_.size());
    for (const Asked& one : asked)
        choices[static_cast<std::size_t>(one.stream->slot())] = one.stream->choice(one.params);
    const std::vector<std::int64_t> tokens = memory_.choose(choices);
    std::vector<std::optional<std::int64_t>> chosen;
    for (const Asked& one : asked) {
        const std::int64_t token = tokens[static_cast<std::size_t>(one.stream->slot())];
        chosen.push_back(token == kNoToken ? std::nullopt : std::optional(token));
        if (token != kNoToken) one.stream->chosen(token);
    }
    return chosen;
}

}  // namespace megalodon::detail
