// The kernels of libmegalodon that the runtime calls itself, through its C interface.
#pragma once

#include <megalodon/megalodon.h>

#include <memory>
#include <vector>

#include "gpu.hpp"
#include "library.hpp"

namespace megalodon::detail {

class Kernels {
 public:
    // Throws Error: missing_library for another library, engine for another version of its interface.
    explicit Kernels(const Library& library);

    int abi_version() const { return abi_version_; }

    // Enqueue writing new rows behind those that memory holds.
    void append_rows(const StepPlan& step, CUstream stream) const;

    // The next token of each row of logits [B, V] on the GPU.
    std::vector<std::int64_t> choose(const Gpu& gpu, const float* logits, std::int64_t vocab_size,
                                     const std::vector<TokenChoice>& choices);

 private:
    // Settings of each row, then the tokens that their penalties look at, as one piece: one copy brings both.
    struct Table {
        std::vector<std::byte> bytes;
        std::size_t recent_offset;
        std::int64_t max_recent;
    };
    static Table table_of(const std::vector<TokenChoice>& choices, std::int64_t vocab_size);
    static void reserve(const Gpu& gpu, std::unique_ptr<GpuMemory>& memory, std::size_t& held, std::size_t bytes);
    void check(int status) const;  // throws Error (engine)

    decltype(&mgd_append_rows) append_rows_;
    decltype(&mgd_choose_tokens) choose_tokens_;
    decltype(&mgd_choose_tokens_workspace_bytes) workspace_bytes_of_;
    decltype(&mgd_status_string) status_string_;
    int abi_version_;
    // For the largest call so far.
    std::unique_ptr<GpuMemory> table_, workspace_, tokens_;
    std::size_t table_bytes_ = 0, workspace_bytes_ = 0, tokens_bytes_ = 0;
};

}  // namespace megalodon::detail
