#include "slot_memory.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

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
    : engine_(engine), manifest_(manifest), num_slots_(num_slots), used_(static_cast<std::size_t>(num_slots), 0) {
    for (const StateSpec& spec : manifest.state) {
        const Shape shape = concrete_shape(spec.past_shape, num_slots, 0, manifest.chunk_size);
        const std::size_t bytes = bytes_of(shape, spec.dtype);
        if (spec.is_appended()) {
            const std::size_t row_bytes = static_cast<std::size_t>(spec.rows_inner()) * byte_size(spec.dtype);
            appended_.push_back({&spec, static_cast<std::size_t>(spec.rows_outer()), row_bytes, Buffer(engine, bytes)});
        } else {
            const std::size_t slot_bytes = bytes / static_cast<std::size_t>(num_slots);
            replaced_.push_back({&spec, slot_bytes, Buffer(engine, bytes), Buffer(engine, bytes)});
        }
    }
    if (engine.has_fixed_capacity()) capacity_ = manifest.chunk_size;
}

const std::vector<float>& SlotMemory::run(SlotRange range, const std::vector<std::int64_t>& tokens,
                                          const std::vector<std::int64_t>& positions, std::int64_t num_tokens) {
    CallBuffers prefill;
    if (num_tokens > 1) prefill = make_buffers(range.size(), num_tokens);
    CallBuffers& buffers = num_tokens > 1 ? prefill : step_buffers(range.size());
    engine_.upload(buffers.tokens.data(), tokens.data(), tokens.size() * sizeof tokens[0]);
    engine_.upload(buffers.position.data(), positions.data(), positions.size() * sizeof positions[0]);
    call(range, num_tokens, buffers);
    append(range, positions, num_tokens, buffers);
    renew(range);
    fetch_logits(range.size(), num_tokens, buffers);
    return logits_;
}

SlotMemory::CallBuffers SlotMemory::make_buffers(std::int64_t batch, std::int64_t num_tokens) {
    const std::int64_t num_logits = manifest_.returns_all_logits ? num_tokens : 1;
    CallBuffers buffers;
    buffers.tokens = Buffer(engine_, bytes_of({batch, num_tokens}, DType::int64));
    buffers.position = Buffer(engine_, bytes_of({batch}, DType::int64));
    buffers.logits = Buffer(engine_, bytes_of({batch, num_logits, manifest_.vocab_size}, DType::float32));
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

void SlotMemory::call(SlotRange range, std::int64_t num_tokens, CallBuffers& buffers) {
    const std::int64_t batch = range.size();
    const std::int64_t num_logits = manifest_.returns_all_logits ? num_tokens : 1;
    std::vector<TensorRef> inputs = {{kTokens, DType::int64, {batch, num_tokens}, buffers.tokens.data()},
                                     {kPosition, DType::int64, {batch}, buffers.position.data()}};
    std::vector<TensorRef> outputs = {
        {kLogits, DType::float32, {batch, num_logits, manifest_.vocab_size}, buffers.logits.data()}};
    const auto bind = [&](const StateSpec& spec, std::byte* past, std::byte* present) {
        inputs.push_back({spec.past, spec.dtype, concrete_shape(spec.past_shape, batch, num_tokens, capacity_), past});
        outputs.push_back(
            {spec.present, spec.dtype, concrete_shape(spec.present_shape, batch, num_tokens, capacity_), present});
    };
    for (std::size_t index = 0; index < appended_.size(); ++index) {
        const Appended& tensor = appended_[index];
        bind(*tensor.spec, row_address(tensor, range.first, 0, 0), buffers.new_rows[index].data());
    }
    for (const Replaced& tensor : replaced_) {
        const std::size_t offset = static_cast<std::size_t>(range.first) * tensor.slot_bytes;
        bind(*tensor.spec, tensor.past.data() + offset, tensor.present.data() + offset);
    }
    engine_.run(inputs, outputs);
}

void SlotMemory::append(SlotRange range, const std::vector<std::int64_t>& positions, std::int64_t num_tokens,
                        const CallBuffers& buffers) {
    std::map<std::int64_t, std::int64_t> used;
    for (std::int64_t row = 0; row < range.size(); ++row) {
        used[range.first + row] = (positions[static_cast<std::size_t>(row)] + num_tokens) % manifest_.chunk_size;
    }
    use(used);
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
    const bool is_whole = range.size() == num_slots_;
    for (Replaced& tensor : replaced_) {
        if (is_whole) {
            tensor.past.swap(tensor.present);
            continue;
        }
        const std::size_t offset = static_cast<std::size_t>(range.first) * tensor.slot_bytes;
        const std::size_t bytes = static_cast<std::size_t>(range.size()) * tensor.slot_bytes;
        engine_.copy(tensor.past.data() + offset, bytes, tensor.present.data() + offset, bytes, bytes, 1);
    }
}

void SlotMemory::fetch_logits(std::int64_t batch, std::int64_t num_tokens, const CallBuffers& buffers) {
    const auto vocab_size = static_cast<std::size_t>(manifest_.vocab_size);
    const std::size_t row_bytes = vocab_size * sizeof(float);
    logits_.resize(static_cast<std::size_t>(batch) * vocab_size);
    if (!manifest_.returns_all_logits || num_tokens == 1) {
        engine_.download(logits_.data(), buffers.logits.data(), logits_.size() * sizeof(float));
        return;
    }
    for (std::int64_t row = 0; row < batch; ++row) {
        const auto last = static_cast<std::size_t>((row + 1) * num_tokens - 1);
        engine_.download(&logits_[static_cast<std::size_t>(row) * vocab_size], buffers.logits.data() + last * row_bytes,
                         row_bytes);
    }
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
    for (const Replaced& tensor : replaced_) {
        HostTensor copy{tensor.spec->dtype, concrete_shape(tensor.spec->past_shape, 1, 0, 0), {}};
        copy.data.resize(tensor.slot_bytes);
        const std::size_t offset = static_cast<std::size_t>(slot) * tensor.slot_bytes;
        engine_.download(copy.data.data(), tensor.past.data() + offset, tensor.slot_bytes);
        tensors[tensor.spec->past] = std::move(copy);
    }
    return tensors;
}

void SlotMemory::write(std::int64_t slot, std::int64_t position, const TensorMap& tensors) {
    const std::int64_t num_rows = position % manifest_.chunk_size;
    use({{slot, num_rows}});
    for (const Appended& tensor : appended_) {
        const HostTensor& source = tensors.at(tensor.spec->past);
        const std::size_t piece = static_cast<std::size_t>(num_rows) * tensor.row_bytes;
        for (std::size_t head = 0; head < tensor.outer && piece > 0; ++head) {
            engine_.upload(row_address(tensor, slot, head, 0), &source.data[head * piece], piece);
        }
    }
    for (const Replaced& tensor : replaced_) {
        const std::size_t offset = static_cast<std::size_t>(slot) * tensor.slot_bytes;
        engine_.upload(tensor.past.data() + offset, tensors.at(tensor.spec->past).data.data(), tensor.slot_bytes);
    }
}

void SlotMemory::retire(std::int64_t slot) {
    if (!is_finite(slot)) clear(slot);
    use({{slot, 0}});
}

// A row that is not finite makes its own token's output so, and the final norm carries that on for ever: the small
// tensors tell of the large ones.
bool SlotMemory::is_finite(std::int64_t slot) const {
    for (const Replaced& tensor : replaced_) {
        HostTensor copy{tensor.spec->dtype, concrete_shape(tensor.spec->past_shape, 1, 0, 0), {}};
        copy.data.resize(tensor.slot_bytes);
        engine_.download(copy.data.data(), tensor.past.data() + static_cast<std::size_t>(slot) * tensor.slot_bytes,
                         tensor.slot_bytes);
        if (!detail::is_finite(copy)) return false;
    }
    return true;
}

void SlotMemory::clear(std::int64_t slot) {
    for (const Replaced& tensor : replaced_) {
        for (const Buffer* half : {&tensor.past, &tensor.present}) {
            engine_.fill_zero(half->data() + static_cast<std::size_t>(slot) * tensor.slot_bytes, tensor.slot_bytes);
        }
    }
    for (const Appended& tensor : appended_) {
        engine_.fill_zero(row_address(tensor, slot, 0, 0),
                          tensor.outer * static_cast<std::size_t>(capacity_) * tensor.row_bytes);
    }
}

void SlotMemory::use(const std::map<std::int64_t, std::int64_t>& used) {
    const std::int64_t kept_rows = *std::max_element(used_.begin(), used_.end());
    for (const auto& [slot, num_rows] : used)
        used_[static_cast<std::size_t>(slot)] = num_rows;
    if (engine_.has_fixed_capacity()) return;
    const std::int64_t most = *std::max_element(used_.begin(), used_.end());
    const std::int64_t capacity = std::min((most + kBucketRows - 1) / kBucketRows * kBucketRows, manifest_.chunk_size);
    if (capacity != capacity_) lay_out(capacity, std::min(kept_rows, capacity));
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
