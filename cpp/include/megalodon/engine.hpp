// What the runtime asks of a backend. Applications only need it to bring a backend of their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "megalodon/tensor.hpp"

namespace megalodon {

// A tensor of one call, in the engine's memory. An empty tensor has an address too.
struct TensorRef {
    std::string name;
    DType dtype;
    Shape shape;
    void* data;
};

// The loaded model, and the memory that it computes in: main memory unless the memory functions are overridden.
//
// Used by one thread at a time. Everything is carried out in the order in which it was asked for; `upload`, `download`
// and nothing else wait for it. All functions may throw Error (engine).
class MEGALODON_API Engine {
 public:
    virtual ~Engine() = default;

    virtual const char* backend() const = 0;

    // One call of the graph: the inputs `tokens`, `position` and every `past_*`, the outputs `logits` and every
    // `new_*` and `present_*`. No output shares memory with an input.
    virtual void run(const std::vector<TensorRef>& inputs, const std::vector<TensorRef>& outputs) = 0;

    virtual std::int64_t max_batch() const { return std::numeric_limits<std::int64_t>::max(); }

    // True: key/value memory always has S = C rows, so that shapes do not change; false: it grows with the streams.
    virtual bool has_fixed_capacity() const { return false; }

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
