// ChunkAttention's launcher: no CUDA and no framework types, so that any front door may include it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megalodon {

/// One call; shapes and types of the tensors stand at mgd_chunk_attention. Device pointers.
struct ChunkAttentionCall {
    int dtype, past_dtype;  // numbers of enum mgd_dtype
    int64_t B, H, T, S;
    int key_width, value_width;  // dz, dv
    int64_t chunk_size;
    const void* q;
    const void* k;
    const void* v;
    const void* past_key;
    const void* past_value;
    const int64_t* position;
    const float* past_key_scale;  // both null where memory has the activations' type
    const float* past_value_scale;
    void* out;
    void* workspace;
};

/// Bytes of workspace that serve any call of at most B rows and S past rows.
size_t chunk_attention_workspace_bytes(int64_t B, int64_t H, int64_t S, int64_t value_width);

/// Enqueues the kernels on `stream` and returns an mgd_status. The caller has checked types, sizes and pointers; B, H,
/// T and both widths are at least 1, the widths at most MGD_MAX_KEY_WIDTH and MGD_MAX_VALUE_WIDTH.
int launch_chunk_attention(const ChunkAttentionCall& call, void* stream);

}  // namespace megalodon
