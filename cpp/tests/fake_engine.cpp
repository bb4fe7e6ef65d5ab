#include "fake_engine.hpp"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace megalodon::test {

namespace {

constexpr std::uintptr_t kDeviceOffset = std::uintptr_t{1} << 56;  // no program can read there

void require(bool is_true, const char* what) {
    if (!is_true) throw std::logic_error(std::string("fake engine: ") + what);
}

bool is_appended(const TensorRef& output) {
    return output.name.rfind("new_", 0) == 0;
}

}  // namespace

void* FakeEngine::host(const void* memory) const {
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    return reinterpret_cast<void*>(options_.is_device ? address - kDeviceOffset : address);
}

void* FakeEngine::allocate(std::size_t bytes) {
    void* memory = Engine::allocate(bytes + sizeof(float));
    // Whole tensors of a stream that has not begun are never looked at, and rows only have to be finite: 1e30 is both
    // wrong and finite.
    const float poison = 1e30f;
    for (std::size_t offset = 0; offset + sizeof poison <= bytes; offset += sizeof poison) {
        std::memcpy(static_cast<char*>(memory) + offset, &poison, sizeof poison);
    }
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    return reinterpret_cast<void*>(options_.is_device ? address + kDeviceOffset : address);
}

void FakeEngine::release(void* memory) noexcept {
    Engine::release(host(memory));
}

void FakeEngine::upload(void* to, const void* from, std::size_t bytes) {
    Engine::upload(host(to), from, bytes);
}

void FakeEngine::download(void* to, const void* from, std::size_t bytes) {
    Engine::download(to, host(from), bytes);
}

void FakeEngine::fill_zero(void* memory, std::size_t bytes) {
    Engine::fill_zero(host(memory), bytes);
}

void FakeEngine::copy(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                      std::size_t rows) {
    Engine::copy(host(to), to_pitch, host(from), from_pitch, width, rows);
}

// The rows' places follow from the positions that lie in its memory when it runs, as they do for a captured graph.
class FakeEngine::Step : public PreparedStep {
 public:
    Step(FakeEngine& engine, StepPlan plan) : engine_(engine), plan_(std::move(plan)) {}

    void run() override {
        engine_.run(plan_.inputs, plan_.outputs);
        const auto* position = static_cast<const std::int64_t*>(engine_.host(plan_.position));
        for (const RowAppend& append : plan_.appends) {
            const auto bytes = static_cast<std::size_t>(append.row_bytes);
            for (std::int64_t row = 0; row < plan_.batch * append.heads; ++row) {
                const std::int64_t place = position[row / append.heads] % plan_.chunk_size;
                std::memcpy(static_cast<char*>(engine_.host(append.memory)) +
                                static_cast<std::size_t>(row * plan_.capacity + place) * bytes,
                            static_cast<const char*>(engine_.host(append.rows)) + static_cast<std::size_t>(row) * bytes,
                            bytes);
            }
        }
    }

 private:
    FakeEngine& engine_;
    StepPlan plan_;
};

std::unique_ptr<PreparedStep> FakeEngine::prepare_step(StepPlan plan) {
    ++num_prepared;
    return options_.is_device ? std::make_unique<Step>(*this, std::move(plan)) : nullptr;
}

void FakeEngine::run(const std::vector<TensorRef>& inputs, const std::vector<TensorRef>& outputs) {
    if (before_call) before_call();
    ++num_calls;
    require(inputs.size() == outputs.size() + 1, "a tensor is missing");
    require(inputs[0].name == "tokens" && inputs[1].name == "position" && outputs[0].name == "logits", "wrong order");
    const std::int64_t batch = inputs[0].shape.at(0);
    require(batch >= 1 && batch <= options_.max_batch, "a batch that the engine does not take");
    for (std::size_t index = 1; index < outputs.size(); ++index) {
        const TensorRef& past = inputs[index + 1];
        require(past.data != outputs[index].data, "past and present share memory");
        require(past.shape.at(0) == batch && outputs[index].shape.at(0) == batch, "batches differ");
        require(!options_.has_fixed_shapes || !is_appended(outputs[index]) || past.shape[2] == options_.chunk_size,
                "the capacity changes");
    }
    for (std::int64_t row = 0; row < batch; ++row)
        run_row(row, inputs, outputs);
}

// What one row of a call consumes.
struct FakeEngine::Row {
    std::int64_t index, position, start, num_tokens;
    const std::int64_t* tokens;
};

void FakeEngine::run_row(std::int64_t index, const std::vector<TensorRef>& inputs,
                         const std::vector<TensorRef>& outputs) {
    Row row{index, static_cast<const std::int64_t*>(host(inputs[1].data))[index], 0, inputs[0].shape.at(1), nullptr};
    row.tokens = static_cast<const std::int64_t*>(host(inputs[0].data)) + index * row.num_tokens;
    row.start = row.position % options_.chunk_size;
    require(row.position >= 0 && row.start + row.num_tokens <= options_.chunk_size, "a call crosses a chunk edge");
    double mixed = 0.01 * static_cast<double>(row.position + row.num_tokens);
    for (std::size_t place = 1; place < outputs.size(); ++place) {
        const TensorRef& past = inputs[place + 1];
        const auto seed = static_cast<double>(place);
        mixed += is_appended(outputs[place]) ? append(row, past, outputs[place], seed)
                                             : renew(row, past, outputs[place], seed);
    }
    const std::int64_t vocab_size = outputs[0].shape.at(2), num_logits = outputs[0].shape.at(1);
    float* logits = static_cast<float*>(host(outputs[0].data)) + index * num_logits * vocab_size;
    for (std::int64_t item = 0; item < num_logits * vocab_size; ++item)
        logits[item] = std::nanf("");
    logits += (num_logits - 1) * vocab_size;  // only the last position's are asked for
    for (std::int64_t item = 0; item < vocab_size; ++item) {
        logits[item] = static_cast<float>(3.0 * std::cos(mixed + static_cast<double>(item * item)));
    }
}

// A decaying memory of all tokens; rounded at every token, so that a call of many equals many calls.
double FakeEngine::renew(const Row& row, const TensorRef& past, const TensorRef& present, double seed) const {
    const std::int64_t size = num_elements(past.shape) / past.shape[0];
    const float* before = static_cast<const float*>(host(past.data)) + row.index * size;
    float* after = static_cast<float*>(host(present.data)) + row.index * size;
    double mixed = 0.0;
    for (std::int64_t item = 0; item < size; ++item) {
        float value = row.position == 0 ? 0.0f : before[item];
        for (std::int64_t token = 0; token < row.num_tokens; ++token) {
            const double added = std::cos(static_cast<double>(item + row.tokens[token]) + seed);
            value = static_cast<float>(0.75 * static_cast<double>(value) + added);
            if (row.tokens[token] == bad_token) value = std::nanf("");
        }
        after[item] = value;
        mixed += std::cos(static_cast<double>(value) * static_cast<double>(item + 1));
    }
    return mixed;
}

// Rows of the open chunk, each weighted by its place, and those behind them by zero, as masked attention does.
double FakeEngine::append(const Row& row, const TensorRef& past, const TensorRef& present, double seed) const {
    const std::int64_t heads = past.shape.at(1), capacity = past.shape.at(2);
    const std::int64_t width = past.shape.size() > 3 ? past.shape[3] : 1;
    require(capacity >= row.start && capacity <= options_.chunk_size, "rows are missing");
    const float* rows = static_cast<const float*>(host(past.data)) + row.index * heads * capacity * width;
    float* fresh = static_cast<float*>(host(present.data)) + row.index * heads * row.num_tokens * width;
    double mixed = 0.0;
    for (std::int64_t head = 0; head < heads; ++head) {
        for (std::int64_t item = 0; item < width; ++item) {
            const auto weigh = [&](float value, std::int64_t weight) {
                mixed += static_cast<double>(value) * static_cast<double>(weight);
            };
            for (std::int64_t place = 0; place < capacity; ++place) {
                weigh(rows[(head * capacity + place) * width + item], place < row.start ? place + 1 + head : 0);
            }
            for (std::int64_t token = 0; token < row.num_tokens; ++token) {
                float& out = fresh[(head * row.num_tokens + token) * width + item];
                out = static_cast<float>(std::sin(static_cast<double>(row.tokens[token] + head + item) + seed));
                if (row.tokens[token] == bad_token) out = std::nanf("");
                weigh(out, row.start + token + 1 + head);
            }
        }
    }
    return mixed;
}

}  // namespace megalodon::test
