#include "slot_memory.hpp"

#include <algorithm>
#include <utility>

#include "convert.hpp"
#include "formats.hpp"
#include "megalodon/state_layout.h"

namespace megalodon::detail {

namespace {

std::size_t bytes_of(const Shape& shape, DType dtype) {
    return static_cast<std::size_t>(num_elements(shape)) * byte_size(dtype);
}

}  // namespace

SlotMemory::SlotMemory(Engine& engine, const Manifest& manifest, std::int64_t num_slots)
    : engine_(engine), manifest_(manifest), num_slots_(num_slots), positions_(static_cast<std::size_t>(num_slots), 0) {
    const auto add_pair = [&](const StateSpec* spec, const Shape& shape, DType dtype) {
        const std::size_t bytes = bytes_of(shape, dtype);
        pairs_.push_back(
            {spec, bytes / static_cast<std::size_t>(num_slots), Buffer(engine, bytes), Buffer(engine, bytes)});
    };
    for (const StateSpec& spec : manifest.state) {
        if (spec.is_appended()) {
            const std::size_t row_bytes = static_cast<std::size_t>(spec.rows_inner()) * byte_size(spec.dtype);
            const Shape shape = concrete_shape(spec.past_shape, num_slots, 0, manifest.chunk_size);
            appended_.push_back({&spec, static_cast<std::size_t>(spec.rows_outer()), row_bytes,
                                 Buffer(engine, bytes_of(shape, spec.dtype))});
        } else {
            add_pair(&spec, concrete_shape(spec.past_shape, num_slots, 0, 0), spec.dtype);
        }
    }
    add_pair(nullptr, {num_slots, manifest.vocab_size}, DType::float32);
    if (engine.has_fixed_shapes()) capacity_ = manifest.chunk_size;
}

void SlotMemory::run(SlotRange range, const std::vector<std::int64_t>& tokens,
                     const std::vector<std::int64_t>& positions, std::int64_t num_tokens) {
    const bool is_step = num_tokens == 1;
    if (!engine_.has_fixed_shapes() || (is_whole(range) && (is_step || num_slots_ == 1))) {
        run_together(range, tokens, positions, num_tokens);
    } else if (is_step) {
        run_all(range, tokens, positions);
    } else {
        for (std::int64_t row = 0; row < range.size(); ++row) {
            const auto first = tokens.begin() + row * num_tokens;
            run_apart(range.first + row, {first, first + num_tokens}, positions[static_cast<std::size_t>(row)]);
        }
    }
}

void SlotMemory::run_together(SlotRange range, const std::vector<std::int64_t>& tokens,
                              const std::vector<std::int64_t>& positions, std::int64_t num_tokens) {
    CallBuffers& buffers = num_tokens > 1 ? piece_buffers(range.size(), num_tokens) : step_buffers(range.size());
    engine_.upload(buffers.tokens.data(), tokens.data(), tokens.size() * sizeof tokens[0]);
    engine_.upload(buffers.position.data(), positions.data(), positions.size() * sizeof positions[0]);
    PreparedStep* step = num_tokens == 1 && is_whole(range) ? prepared_step(buffers) : nullptr;
    if (step != nullptr) {
        step->run();
        for (std::int64_t row = 0; row < range.size(); ++row)
            positions_[static_cast<std::size_t>(row)] = positions[static_cast<std::size_t>(row)] + 1;
    } else {
        const StepPlan call = plan(range, num_tokens, buffers);
        engine_.run(call.inputs, call.outputs);
        append(range, positions, num_tokens, buffers);
        keep_last_logits(range, num_tokens, buffers);
    }
    renew(range);
    if (!engine_.has_fixed_shapes()) piece_ = {};
}

// One token for some of the slots, where a call is one of all. The others' new rows go behind those that count, where
// nothing looks at them; what the call renewed of them is taken back.
void SlotMemory::run_all(SlotRange range, const std::vector<std::int64_t>& tokens,
                         const std::vector<std::int64_t>& positions) {
    const std::vector<std::int64_t> before = positions_;
    std::vector<std::int64_t> all_tokens(before.size(), 0), all_positions = before;
    std::copy(tokens.begin(), tokens.end(), all_tokens.begin() + range.first);
    std::copy(positions.begin(), positions.end(), all_positions.begin() + range.first);
    run_together({0, num_slots_}, all_tokens, all_positions, 1);
    for (std::int64_t slot = 0; slot < num_slots_; ++slot) {
        if (slot >= range.first && slot < range.last) continue;
        const auto index = static_cast<std::size_t>(slot);
        for (const Pair& pair : pairs_) {
            const std::size_t offset = index * pair.slot_bytes;
            engine_.copy(pair.past.data() + offset, pair.slot_bytes, pair.present.data() + offset, pair.slot_bytes,
                         pair.slot_bytes, 1);
        }
        positions_[index] = before[index];
    }
}

// Several tokens of one of several slots, where a call is one of all: in a memory of one slot.
void SlotMemory::run_apart(std::int64_t slot, const std::vector<std::int64_t>& tokens, std::int64_t position) {
    if (!beside_) beside_ = std::make_unique<SlotMemory>(engine_, manifest_, 1);
    if (position > 0) beside_->copy(0, *this, slot, position);
    const auto num_tokens = static_cast<std::int64_t>(tokens.size());
    beside_->run({0, 1}, tokens, {position}, num_tokens);
    copy(slot, *beside_, 0, position + num_tokens);
    beside_->retire(0);  // the next piece may be another stream's
}

std::vector<float> SlotMemory::logits(std::int64_t slot) const {
    const Pair& pair = logits_pair();
    std::vector<float> row(static_cast<std::size_t>(manifest_.vocab_size));
    engine_.download(row.data(), pair.past.data() + static_cast<std::size_t>(slot) * pair.slot_bytes, pair.slot_bytes);
    return row;
}

std::vector<std::int64_t> SlotMemory::choose(const std::vector<TokenChoice>& choices) {
    return engine_.choose(logits_pair().past.data(), manifest_.vocab_size, choices);
}

SlotMemory::CallBuffers SlotMemory::make_buffers(std::int64_t batch, std::int64_t num_tokens) {
    CallBuffers buffers;
    buffers.batch = batch;
    buffers.num_tokens = num_tokens;
    buffers.tokens = Buffer(engine_, bytes_of({batch, num_tokens}, DType::int64));
    buffers.position = Buffer(engine_, bytes_of({batch}, DType::int64));
    if (manifest_.returns_all_logits && num_tokens > 1) {
        buffers.all_logits = Buffer(engine_, bytes_of({batch, num_tokens, manifest_.vocab_size}, DType::float32));
    }
    for (const Appended& tensor : appended_) {
        const std::size_t rows = static_cast<std::size_t>(batch) * tensor.outer * static_cast<std::size_t>(num_tokens);
        buffers.new_rows.emplace_back(engine_, rows * tensor.row_bytes);
    }
    return buffers;
}

SlotMemory::CallBuffers& SlotMemory::step_buffers(std::int64_t batch) {
    const auto found = step_buffers_.find(batch);
    if (found != step_buffers_.end()) return found->second;
    return step_buffers_.emplace(batch, make_buffers(batch, 1)).first->second;
}

// For several tokens. Main memory is given back after the call; that of a device stays, for the longest piece so far:
// allocating there waits for all its work.
SlotMemory::CallBuffers& SlotMemory::piece_buffers(std::int64_t batch, std::int64_t num_tokens) {
    if (piece_.batch != batch || piece_.num_tokens < num_tokens) {
        piece_ = {};  // first, so that there need not be room for both
        piece_ = make_buffers(batch, num_tokens);
    }
    return piece_;
}

StepPlan SlotMemory::plan(SlotRange range, std::int64_t num_tokens, const CallBuffers& buffers) const {
    const std::int64_t batch = range.size();
    StepPlan plan{{}, {}, {}, buffers.position.data(), batch, capacity_, manifest_.chunk_size};
    plan.inputs = {{kTokens, DType::int64, {batch, num_tokens}, buffers.tokens.data()},
                   {kPosition, DType::int64, {batch}, buffers.position.data()}};
    const bool has_all_logits = buffers.all_logits.data() != nullptr;
    const auto offset = [&](const Pair& pair) { return static_cast<std::size_t>(range.first) * pair.slot_bytes; };
    std::byte* logits =
        has_all_logits ? buffers.all_logits.data() : logits_pair().present.data() + offset(logits_pair());
    plan.outputs = {{kLogits, DType::float32, {batch, has_all_logits ? num_tokens : 1, manifest_.vocab_size}, logits}};
    const auto bind = [&](const StateSpec& spec, std::byte* past, std::byte* present) {
        const auto shape = [&](const Shape& given) { return concrete_shape(given, batch, num_tokens, capacity_); };
        plan.inputs.push_back({spec.past, spec.dtype, shape(spec.past_shape), past});
        plan.outputs.push_back({spec.present, spec.dtype, shape(spec.present_shape), present});
    };
    for (std::size_t index = 0; index < appended_.size(); ++index) {
        const Appended& tensor = appended_[index];
        std::byte* memory = row_address(tensor, range.first, 0, 0);
        bind(*tensor.spec, memory, buffers.new_rows[index].data());
        plan.appends.push_back({buffers.new_rows[index].data(), memory, static_cast<std::int64_t>(tensor.outer),
                                static_cast<std::int64_t>(tensor.row_bytes)});
    }
    for (const Pair& pair : pairs_) {
        if (pair.spec != nullptr) bind(*pair.spec, pair.past.data() + offset(pair), pair.present.data() + offset(pair));
    }
    return plan;
}

// The engine's own way for a step of all slots; null: there is none.
PreparedStep* SlotMemory::prepared_step(const CallBuffers& buffers) {
    if (!engine_.has_fixed_shapes()) return nullptr;  // the capacity changes, and addresses with it
    auto& step = steps_[half_];
    if (!step) step = engine_.prepare_step(plan({0, num_slots_}, 1, buffers));
    return step->get();
}

void SlotMemory::append(SlotRange range, const std::vector<std::int64_t>& positions, std::int64_t num_tokens,
                        const CallBuffers& buffers) {
    std::map<std::int64_t, std::int64_t> after;
    for (std::int64_t row = 0; row < range.size(); ++row)
        after[range.first + row] = positions[static_cast<std::size_t>(row)] + num_tokens;
    place(after);
    const auto tokens = static_cast<std::size_t>(num_tokens);
    for (std::int64_t row = 0; row < range.size(); ++row) {
        const std::int64_t start = positions[static_cast<std::size_t>(row)] % manifest_.chunk_size;
        if (start + num_tokens == manifest_.chunk_size) continue;  // complete: nothing looks at its rows any more
        for (std::size_t index = 0; index < appended_.size(); ++index) {
            const Appended& tensor = appended_[index];
            const std::size_t piece = tokens * tensor.row_bytes;  // of one head
            const std::byte* rows =
                buffers.new_rows[index].data() + static_cast<std::size_t>(row) * tensor.outer * piece;
            engine_.copy(row_address(tensor, range.first + row, 0, start),
                         static_cast<std::size_t>(capacity_) * tensor.row_bytes, rows, piece, piece, tensor.outer);
        }
    }
}

void SlotMemory::renew(SlotRange range) {
    if (is_whole(range)) half_ = 1 - half_;
    for (Pair& pair : pairs_) {
        if (is_whole(range)) {
            pair.past.swap(pair.present);
            continue;
        }
        const std::size_t offset = static_cast<std::size_t>(range.first) * pair.slot_bytes;
        const std::size_t bytes = static_cast<std::size_t>(range.size()) * pair.slot_bytes;
        engine_.copy(pair.past.data() + offset, bytes, pair.present.data() + offset, bytes, bytes, 1);
    }
}

// Of the logits of all positions, the last ones go where a call that returns no others writes them.
void SlotMemory::keep_last_logits(SlotRange range, std::int64_t num_tokens, const CallBuffers& buffers) {
    if (buffers.all_logits.data() == nullptr) return;
    const std::size_t row_bytes = logits_pair().slot_bytes, pitch = row_bytes * static_cast<std::size_t>(num_tokens);
    engine_.copy(logits_pair().present.data() + static_cast<std::size_t>(range.first) * row_bytes, row_bytes,
                 buffers.all_logits.data() + pitch - row_bytes, pitch, row_bytes,
                 static_cast<std::size_t>(range.size()));
}

TensorMap SlotMemory::read(std::int64_t slot, std::int64_t position) const {
    TensorMap tensors;
    const std::int64_t num_rows = position % manifest_.chunk_size;
    for (const Appended& tensor : appended_) {
        HostTensor copy{tensor.spec->dtype, concrete_shape(tensor.spec->past_shape, 1, 0, num_rows), {}};
        const std::size_t piece = static_cast<std::size_t>(num_rows) * tensor.row_bytes;
        copy.data.resize(tensor.outer * piece);
        for (std::size_t head = 0; head < tensor.outer && piece > 0; ++head) {
            engine_.download(&copy.data[head * piece], row_address(tensor, slot, head, 0), piece);
        }
        tensors[tensor.spec->past] = std::move(copy);
    }
    for (const Pair& pair : pairs_) {
        if (pair.spec != nullptr) tensors[pair.spec->past] = read(pair, slot);
    }
    return tensors;
}

HostTensor SlotMemory::read(const Pair& pair, std::int64_t slot) const {
    HostTensor copy{pair.spec->dtype, concrete_shape(pair.spec->past_shape, 1, 0, 0), {}};
    copy.data.resize(pair.slot_bytes);
    const std::size_t offset = static_cast<std::size_t>(slot) * pair.slot_bytes;
    engine_.download(copy.data.data(), pair.past.data() + offset, pair.slot_bytes);
    return copy;
}

void SlotMemory::write(std::int64_t slot, std::int64_t position, const TensorMap& tensors,
                       const std::vector<float>& logits) {
    const std::int64_t num_rows = position % manifest_.chunk_size;
    place({{slot, position}});
    for (const Appended& tensor : appended_) {
        const HostTensor& source = tensors.at(tensor.spec->past);
        const std::size_t piece = static_cast<std::size_t>(num_rows) * tensor.row_bytes;
        for (std::size_t head = 0; head < tensor.outer && piece > 0; ++head) {
            engine_.upload(row_address(tensor, slot, head, 0), &source.data[head * piece], piece);
        }
    }
    for (const Pair& pair : pairs_) {
        std::byte* to = pair.past.data() + static_cast<std::size_t>(slot) * pair.slot_bytes;
        if (pair.spec != nullptr) {
            engine_.upload(to, tensors.at(pair.spec->past).data.data(), pair.slot_bytes);
        } else if (!logits.empty()) {
            engine_.upload(to, logits.data(), pair.slot_bytes);
        }
    }
}

void SlotMemory::copy(std::int64_t slot, const SlotMemory& source, std::int64_t source_slot, std::int64_t position) {
    place({{slot, position}});
    const auto num_rows = static_cast<std::size_t>(position % manifest_.chunk_size);
    for (std::size_t index = 0; index < appended_.size() && num_rows > 0; ++index) {
        const Appended &to = appended_[index], &from = source.appended_[index];
        engine_.copy(row_address(to, slot, 0, 0), static_cast<std::size_t>(capacity_) * to.row_bytes,
                     source.row_address(from, source_slot, 0, 0),
                     static_cast<std::size_t>(source.capacity_) * to.row_bytes, num_rows * to.row_bytes, to.outer);
    }
    for (std::size_t index = 0; index < pairs_.size(); ++index) {
        const std::size_t bytes = pairs_[index].slot_bytes;
        engine_.copy(pairs_[index].past.data() + static_cast<std::size_t>(slot) * bytes, bytes,
                     source.pairs_[index].past.data() + static_cast<std::size_t>(source_slot) * bytes, bytes, bytes, 1);
    }
}

void SlotMemory::retire(std::int64_t slot) {
    if (!is_finite(slot)) clear(slot);
    place({{slot, 0}});
}

// What is not finite anywhere reaches the final norm in the same call, and its statistics keep it for ever.
bool SlotMemory::is_finite(std::int64_t slot) const {
    const auto is_state = [](const Pair& pair) { return pair.spec != nullptr; };
    const auto final_norm = std::find_if(pairs_.rbegin(), pairs_.rend(), is_state);  // the last of the graph's order
    return final_norm == pairs_.rend() || detail::is_finite(read(*final_norm, slot));
}

void SlotMemory::clear(std::int64_t slot) {
    for (const Pair& pair : pairs_) {
        for (const Buffer* half : {&pair.past, &pair.present}) {
            engine_.fill_zero(half->data() + static_cast<std::size_t>(slot) * pair.slot_bytes, pair.slot_bytes);
        }
    }
    for (const Appended& tensor : appended_) {
        engine_.fill_zero(row_address(tensor, slot, 0, 0),
                          tensor.outer * static_cast<std::size_t>(capacity_) * tensor.row_bytes);
    }
}

// Note where slots stand; memory that grows with them is laid out for the longest.
void SlotMemory::place(const std::map<std::int64_t, std::int64_t>& positions) {
    const std::int64_t kept_rows = longest();
    for (const auto& [slot, position] : positions)
        positions_[static_cast<std::size_t>(slot)] = position;
    if (engine_.has_fixed_shapes()) return;
    const std::int64_t buckets = (longest() + kBucketRows - 1) / kBucketRows;
    const std::int64_t capacity = std::min(buckets * kBucketRows, manifest_.chunk_size);
    if (capacity != capacity_) lay_out(capacity, std::min(kept_rows, capacity));
}

// Rows of the longest open chunk.
std::int64_t SlotMemory::longest() const {
    std::int64_t most = 0;
    for (const std::int64_t position : positions_)
        most = std::max(most, position % manifest_.chunk_size);
    return most;
}

// Change the capacity, moving the first `kept_rows` rows of every head to their new place. The rest is cleared: what
// lay there may come from another slot, and a NaN times a masked weight is a NaN.
void SlotMemory::lay_out(std::int64_t capacity, std::int64_t kept_rows) {
    for (const Appended& tensor : appended_) {
        const std::size_t heads = static_cast<std::size_t>(num_slots_) * tensor.outer;
        const std::size_t old_pitch = static_cast<std::size_t>(capacity_) * tensor.row_bytes;
        const std::size_t new_pitch = static_cast<std::size_t>(capacity) * tensor.row_bytes;
        const std::size_t kept = static_cast<std::size_t>(kept_rows) * tensor.row_bytes;
        std::byte* memory = tensor.memory.data();
        if (kept > 0 && heads > 1) {  // a single head stays where it is
            const Buffer moved(engine_, heads * kept);
            engine_.copy(moved.data(), kept, memory, old_pitch, kept, heads);
            engine_.copy(memory, new_pitch, moved.data(), kept, kept, heads);
        }
        for (std::size_t head = 0; head < heads && new_pitch > kept; ++head) {
            engine_.fill_zero(memory + head * new_pitch + kept, new_pitch - kept);
        }
    }
    capacity_ = capacity;
}

std::byte* SlotMemory::row_address(const Appended& tensor, std::int64_t slot, std::size_t head,
                                   std::int64_t row) const {
    const std::size_t heads_before = static_cast<std::size_t>(slot) * tensor.outer + head;
    const std::size_t rows_before = heads_before * static_cast<std::size_t>(capacity_) + static_cast<std::size_t>(row);
    return tensor.memory.data() + rows_before * tensor.row_bytes;
}

}  // namespace megalodon::detail
