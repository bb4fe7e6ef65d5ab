// What the runtime asks of a backend. Applications only need it to bring a backend of their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "megalodon/sampling.hpp"
#include "megalodon/tensor.hpp"

namespace megalodon {

// A tensor of one call, in the engine's memory. An empty tensor has an address too.
struct TensorRef {
    std::string name;
    DType dtype;
    Shape shape;
    void* data;
};

// New rows [B, heads, T] of a call, of `row_bytes` each, and the memory [B, heads, S] that they go to.
struct RowAppend {
    const void* rows;
    void* memory;
    std::int64_t heads;
    std::int64_t row_bytes;
};

// A call of one token for all slots of a memory, after which new rows go to row (position mod C) of their memory. Every
// address stays as it is while the step is used.
struct StepPlan {
    std::vector<TensorRef> inputs, outputs;
    std::vector<RowAppend> appends;
    const void* position;  // [B] int64 in the engine's memory, read when the step is carried out
    std::int64_t batch, capacity, chunk_size;
};

// A step that is carried out often.
class MEGALODON_API PreparedStep {
 public:
    virtual ~PreparedStep() = default;
    virtual void run() = 0;
};

// How the next token of a row is chosen; `recent`: the tokens that the repetition penalty applies to, each once.
struct TokenChoice {
    bool is_wanted = false;
    SamplingParams params;
    double uniform = 0.0;  // the number to draw with
    std::vector<std::int64_t> recent;
};

// The loaded model, and the memory that it computes in: main memory unless the memory functions are overridden.
//
// Used by one thread at a time. Everything is carried out in the order in which it was asked for; `download` and
// `choose` wait for it, and what `upload` is given may change as soon as it returns. All functions may throw Error
// (engine).
class MEGALODON_API Engine {
 public:
    virtual ~Engine() = default;

    virtual const char* backend() const = 0;

    // One call of the graph: the inputs `tokens`, `position` and every `past_*`, the outputs `logits` and every
    // `new_*` and `present_*`. No output shares memory with an input.
    virtual void run(const std::vector<TensorRef>& inputs, const std::vector<TensorRef>& outputs) = 0;

    virtual std::int64_t max_batch() const { return 1 << 16; }

    // True: shapes and addresses change as little as can be. Key/value memory always has S = C rows, and a call is one
    // of all slots of a memory; slots that shall wait run along. False: rows grow with the streams, and a call is one
    // of the slots that it is for.
    virtual bool has_fixed_shapes() const { return false; }

    // A step to be carried out from now on, or null: `run` and `copy` do.
    virtual std::unique_ptr<PreparedStep> prepare_step(StepPlan plan);

    // The next token of each row of logits [B, V], float32 in the engine's memory; -1 where the largest logit is not
    // finite. Rows that are not wanted get no defined token.
    virtual std::vector<std::int64_t> choose(const void* logits, std::int64_t vocab_size,
                                             const std::vector<TokenChoice>& choices);

    virtual void* allocate(std::size_t bytes);  // zero-filled, aligned for any element
    virtual void release(void* memory) noexcept;
    virtual void upload(void* to, const void* from_host, std::size_t bytes);
    virtual void download(void* to_host, const void* from, std::size_t bytes);
    virtual void fill_zero(void* memory, std::size_t bytes);

    // `rows` pieces of `width` bytes, `pitch` bytes apart on either side.
    virtual void copy(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                      std::size_t rows);
};

}  // namespace megalodon
