// A backend without a model: a toy recurrence that notices every mistake of the slot logic.
#pragma once

#include <functional>
#include <memory>

#include "megalodon/engine.hpp"

namespace megalodon::test {

struct FakeOptions {
    std::int64_t chunk_size = 12;
    std::int64_t max_batch = 1 << 20;
    bool has_fixed_shapes = false;
    bool is_device = false;  // its memory cannot be read by the program, as a GPU's cannot
};

// Logits depend on every token since the stream began, on the rows of the open chunk by their place in it, and on the
// position. Memory comes poisoned with huge numbers.
class FakeEngine : public Engine {
 public:
    explicit FakeEngine(FakeOptions options = {}) : options_(options) {}

    const char* backend() const override { return "fake"; }
    std::int64_t max_batch() const override { return options_.max_batch; }
    bool has_fixed_shapes() const override { return options_.has_fixed_shapes; }
    std::unique_ptr<PreparedStep> prepare_step(StepPlan plan) override;  // where its memory is a device's
    void run(const std::vector<TensorRef>& inputs, const std::vector<TensorRef>& outputs) override;

    void* allocate(std::size_t bytes) override;
    void release(void* memory) noexcept override;
    void upload(void* to, const void* from_host, std::size_t bytes) override;
    void download(void* to_host, const void* from, std::size_t bytes) override;
    void fill_zero(void* memory, std::size_t bytes) override;
    void copy(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
              std::size_t rows) override;

    int num_calls = 0;
    int num_prepared = 0;
    std::function<void()> before_call;  // may throw
    std::int64_t bad_token = -1;        // a stream that consumes it has NaN in its states and in the token's row

 private:
    class Step;
    void* host(const void* memory) const;
    struct Row;
    double renew(const Row& row, const TensorRef& past, const TensorRef& present, double seed) const;
    double append(const Row& row, const TensorRef& past, const TensorRef& present, double seed) const;
    void run_row(std::int64_t index, const std::vector<TensorRef>& inputs, const std::vector<TensorRef>& outputs);

    FakeOptions options_;
};

}  // namespace megalodon::test
