#include "c_api/checks.h"
#include "operators/chunk_attention/launch.h"

namespace {

using megalodon::is_activation;
using megalodon::none_negative;
using megalodon::none_null;

bool is_quantised(int dtype) {
    return dtype == MGD_FLOAT8_E4M3 || dtype == MGD_INT8;
}

}  // namespace

size_t mgd_chunk_attention_workspace_bytes(int64_t B, int64_t H, int64_t S, int64_t dv) {
    return none_negative(B, H, S, dv) ? megalodon::chunk_attention_workspace_bytes(B, H, S, dv) : 0;
}

int mgd_chunk_attention(int dtype, int past_dtype, int64_t B, int64_t H, int64_t T, int64_t S, int64_t dz, int64_t dv,
                        const void* q, const void* k, const void* v, const void* past_key, const void* past_value,
                        const int64_t* position, const float* past_key_scale, const float* past_value_scale, int64_t C,
                        void* out, void* workspace, size_t workspace_bytes, void* stream) {
    return megalodon::without_exceptions([&]() -> int {
        if (!is_activation(dtype) || (past_dtype != dtype && !is_quantised(past_dtype))) return MGD_INVALID_ARGUMENT;
        if (!none_negative(B, H, T, S) || dz < 1 || dv < 1 || C < 1) return MGD_INVALID_ARGUMENT;
        if (B == 0 || H == 0 || T == 0) return MGD_OK;
        if (!none_null(q, k, v, static_cast<const void*>(position), static_cast<const void*>(out))) {
            return MGD_INVALID_ARGUMENT;
        }
        if (S > 0 && !none_null(past_key, past_value)) return MGD_INVALID_ARGUMENT;
        const bool has_scales = none_null(past_key_scale, past_value_scale);
        if (S > 0 && has_scales != is_quantised(past_dtype)) return MGD_INVALID_ARGUMENT;
        if (!has_scales && (past_key_scale != past_value_scale)) return MGD_INVALID_ARGUMENT;
        if (dz > MGD_MAX_KEY_WIDTH || dv > MGD_MAX_VALUE_WIDTH) return MGD_UNSUPPORTED;
        const size_t needed_bytes = T == 1 ? megalodon::chunk_attention_workspace_bytes(B, H, S, dv) : 0;
        if (!megalodon::is_workspace(workspace, workspace_bytes, needed_bytes)) return MGD_INVALID_ARGUMENT;
        megalodon::ChunkAttentionCall call{};
        call.dtype = dtype, call.past_dtype = past_dtype;
        call.B = B, call.H = H, call.T = T, call.S = S;
        call.key_width = static_cast<int>(dz), call.value_width = static_cast<int>(dv), call.chunk_size = C;
        call.q = q, call.k = k, call.v = v, call.past_key = past_key, call.past_value = past_value;
        call.position = position;
        call.past_key_scale = past_key_scale, call.past_value_scale = past_value_scale;
        call.out = out, call.workspace = workspace;
        return megalodon::launch_chunk_attention(call, stream);
    });
}
