// libmegalodon of the stand-in for a GPU machine (fake_device.hpp), as its header describes it.
#include <megalodon/megalodon.h>

#include <cstring>

#include "choice.hpp"
#include "fake_device.hpp"

using namespace megalodon::test;

FAKE_EXPORT std::int32_t mgd_abi_version(void) {
    return MGD_ABI_VERSION;
}
FAKE_EXPORT const char* mgd_status_string(int) {
    return "a refusal of the stand-in";
}
FAKE_EXPORT int mgd_append_rows(const mgd_append* tensors, std::int64_t count, std::int64_t B, std::int64_t T,
                                std::int64_t S, std::int64_t C, const std::int64_t* position, void* stream) {
    const std::vector<mgd_append> table(tensors, tensors + count);
    const auto work = [=] {
        const auto* positions = reinterpret_cast<const std::int64_t*>(host(position, static_cast<std::size_t>(B) * 8));
        for (const mgd_append& append : table) {
            const auto bytes = static_cast<std::size_t>(append.row_bytes);
            const auto places = static_cast<std::size_t>(B * append.heads);
            const char* rows = host(append.rows, places * static_cast<std::size_t>(T) * bytes);
            char* memory = host(append.memory, places * static_cast<std::size_t>(S) * bytes);
            for (std::int64_t place = 0; place < B * append.heads; ++place) {
                const std::int64_t first = positions[place / append.heads] % C;
                for (std::int64_t token = 0; token < T && first + token < S; ++token) {
                    std::memcpy(memory + static_cast<std::size_t>(place * S + first + token) * bytes,
                                rows + static_cast<std::size_t>(place * T + token) * bytes, bytes);
                }
            }
        }
    };
    return enqueue(stream, work) == CUDA_SUCCESS ? MGD_OK : MGD_INTERNAL_ERROR;
}
FAKE_EXPORT std::size_t mgd_choose_tokens_workspace_bytes(std::int64_t B, std::int64_t V) {
    return static_cast<std::size_t>(8 * B * V);
}
FAKE_EXPORT int mgd_choose_tokens(std::int64_t B, std::int64_t V, const float* logits, const mgd_choice* choices,
                                  const std::int64_t* recent, std::int64_t max_recent, std::int64_t* tokens,
                                  void* workspace, std::size_t workspace_bytes, void* stream) {
    const auto rows = static_cast<std::size_t>(B), width = static_cast<std::size_t>(V);
    const auto most = static_cast<std::size_t>(max_recent);
    const auto work = [=] {
        require(workspace_bytes >= mgd_choose_tokens_workspace_bytes(B, V), "a workspace that is too small");
        host(workspace, workspace_bytes);
        const auto* all = reinterpret_cast<const float*>(host(logits, rows * width * sizeof(float)));
        const auto* settings = reinterpret_cast<const mgd_choice*>(host(choices, rows * sizeof(mgd_choice)));
        const auto* seen = reinterpret_cast<const std::int64_t*>(host(recent, rows * most * 8));
        auto* chosen = reinterpret_cast<std::int64_t*>(host(tokens, rows * 8));
        for (std::size_t row = 0; row < rows; ++row) {
            const mgd_choice& given = settings[row];
            if (given.is_wanted == 0) continue;
            megalodon::SamplingParams params{given.temperature,        {},  given.top_p, given.min_p,
                                             given.repetition_penalty, 256, {}};
            if (given.top_k > 0) params.top_k = static_cast<std::uint64_t>(given.top_k);
            const auto* first = seen + row * most;
            const megalodon::TokenChoice choice{true, params, given.uniform, {first, first + given.num_recent}};
            chosen[row] = megalodon::detail::choose({all + row * width, all + (row + 1) * width}, choice);
        }
    };
    return enqueue(stream, work) == CUDA_SUCCESS ? MGD_OK : MGD_INTERNAL_ERROR;
}
