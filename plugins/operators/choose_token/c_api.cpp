#include "c_api/checks.h"
#include "operators/choose_token/launch.h"

size_t mgd_choose_tokens_workspace_bytes(int64_t B, int64_t V) {
    return megalodon::none_negative(B, V) ? static_cast<size_t>(B) * static_cast<size_t>(V) * sizeof(double) : 0;
}

int mgd_choose_tokens(int64_t B, int64_t V, const float* logits, const mgd_choice* choices, const int64_t* recent,
                      int64_t max_recent, int64_t* tokens, void* workspace, size_t workspace_bytes, void* stream) {
    return megalodon::without_exceptions([&]() -> int {
        if (!megalodon::none_negative(B, max_recent) || V < 1) return MGD_INVALID_ARGUMENT;
        if (B == 0) return MGD_OK;
        if (!megalodon::none_null(logits, tokens) || choices == nullptr) return MGD_INVALID_ARGUMENT;
        if (max_recent > 0 && recent == nullptr) return MGD_INVALID_ARGUMENT;
        const size_t needed_bytes = mgd_choose_tokens_workspace_bytes(B, V);
        if (!megalodon::is_workspace(workspace, workspace_bytes, needed_bytes)) return MGD_INVALID_ARGUMENT;
        if (V > MGD_MAX_VOCABULARY) return MGD_UNSUPPORTED;
        return megalodon::launch_choose_token({B, V, max_recent, logits, choices, recent, workspace, tokens}, stream);
    });
}
