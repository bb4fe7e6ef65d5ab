#include "kernels.hpp"

#include <algorithm>
#include <cstring>

#include "choice.hpp"
#include "formats.hpp"

namespace megalodon::detail {

namespace {

mgd_choice settings_of(const TokenChoice& choice, std::int64_t vocab_size) {
    const SamplingParams& params = choice.params;
    const std::uint64_t top_k =
        std::min<std::uint64_t>(params.top_k.value_or(0), static_cast<std::uint64_t>(vocab_size));
    return {params.temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            choice.uniform,
            static_cast<std::int64_t>(top_k),
            static_cast<std::int64_t>(choice.recent.size()),
            choice.is_wanted ? 1 : 0};
}

}  // namespace

Kernels::Kernels(const Library& library)
    : append_rows_(library.get<decltype(append_rows_)>("mgd_append_rows")),
      choose_tokens_(library.get<decltype(choose_tokens_)>("mgd_choose_tokens")),
      workspace_bytes_of_(library.get<decltype(workspace_bytes_of_)>("mgd_choose_tokens_workspace_bytes")),
      status_string_(library.get<decltype(status_string_)>("mgd_status_string")),
      abi_version_(library.get<decltype(&mgd_abi_version)>("mgd_abi_version")()) {
    if (abi_version_ == MGD_ABI_VERSION) return;
    throw Error(ErrorKind::engine, library.path() + " has version " + std::to_string(abi_version_) +
                                       " of its interface, this release needs " + std::to_string(MGD_ABI_VERSION) +
                                       "; build it again with `make plugins`");
}

void Kernels::append_rows(const StepPlan& step, CUstream stream) const {
    std::vector<mgd_append> table;
    for (const RowAppend& append : step.appends)
        table.push_back({append.rows, append.memory, append.heads, append.row_bytes});
    check(append_rows_(table.data(), static_cast<std::int64_t>(table.size()), step.batch, 1, step.capacity,
                       step.chunk_size, static_cast<const std::int64_t*>(step.position), stream));
}

Kernels::Table Kernels::table_of(const std::vector<TokenChoice>& choices, std::int64_t vocab_size) {
    std::size_t max_recent = 1;
    for (const TokenChoice& choice : choices)
        max_recent = std::max(max_recent, choice.recent.size());
    Table table{{}, choices.size() * sizeof(mgd_choice), static_cast<std::int64_t>(max_recent)};
    const std::size_t row_bytes = max_recent * sizeof(std::int64_t);
    table.bytes.resize(table.recent_offset + choices.size() * row_bytes);
    for (std::size_t row = 0; row < choices.size(); ++row) {
        const mgd_choice settings = settings_of(choices[row], vocab_size);
        std::memcpy(&table.bytes[row * sizeof settings], &settings, sizeof settings);
        if (choices[row].recent.empty()) continue;
        std::memcpy(&table.bytes[table.recent_offset + row * row_bytes], choices[row].recent.data(),
                    choices[row].recent.size() * sizeof(std::int64_t));
    }
    return table;
}

std::vector<std::int64_t> Kernels::choose(const Gpu& gpu, const float* logits, std::int64_t vocab_size,
                                          const std::vector<TokenChoice>& choices) {
    const Table table = table_of(choices, vocab_size);
    const auto batch = static_cast<std::int64_t>(choices.size());
    std::vector<std::int64_t> tokens(choices.size(), kNoToken);
    const std::size_t tokens_bytes = tokens.size() * sizeof tokens[0];
    const std::size_t workspace_bytes = workspace_bytes_of_(batch, vocab_size);
    const std::size_t row_bytes = sizeof(mgd_choice) + kHistoryTokens * sizeof(std::int64_t);
    reserve(gpu, table_, table_bytes_, choices.size() * row_bytes);  // at once for the longest history
    reserve(gpu, workspace_, workspace_bytes_, workspace_bytes);
    reserve(gpu, tokens_, tokens_bytes_, tokens_bytes);
    const auto address = [](const std::unique_ptr<GpuMemory>& memory) {
        return reinterpret_cast<CUdeviceptr>(memory->data());
    };
    const CudaDriver& driver = gpu.driver();
    gpu.check(driver.copy_to_device(address(table_), table.bytes.data(), table.bytes.size(), gpu.stream()),
              "copying to the GPU");
    const auto* settings = static_cast<const std::byte*>(table_->data());
    check(choose_tokens_(batch, vocab_size, logits, reinterpret_cast<const mgd_choice*>(settings),
                         reinterpret_cast<const std::int64_t*>(settings + table.recent_offset), table.max_recent,
                         static_cast<std::int64_t*>(tokens_->data()), workspace_->data(), workspace_bytes,
                         gpu.stream()));
    gpu.check(driver.copy_to_host(tokens.data(), address(tokens_), tokens_bytes, gpu.stream()), "copying from the GPU");
    gpu.check(driver.stream_synchronize(gpu.stream()), "a call of the model");
    return tokens;
}

void Kernels::reserve(const Gpu& gpu, std::unique_ptr<GpuMemory>& memory, std::size_t& held, std::size_t bytes) {
    if (memory && held >= bytes) return;
    memory.reset();
    memory = std::make_unique<GpuMemory>(gpu, bytes);
    held = bytes;
}

void Kernels::check(int status) const {
    if (status == MGD_OK) return;
    throw Error(ErrorKind::engine, std::string("libmegalodon: ") + status_string_(status) +
                                       "; build it again for this GPU with `make plugins`");
}

}  // namespace megalodon::detail
