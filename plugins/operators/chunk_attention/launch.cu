#include "operators/chunk_attention/launch.h"

#include <algorithm>

#include "common/launch.h"
#include "operators/chunk_attention/decode.cuh"
#include "operators/chunk_attention/prefill.cuh"

namespace megalodon {
namespace {

using chunk_attention::kMaxSplitRows;
using chunk_attention::Split;

// Two blocks for each of the 132 multiprocessors of an H200 can be resident; more parts would only mean more to join.
constexpr int64_t kWantedBlocks = 264;
constexpr int64_t kMinSplitRows = 16;

/// The longest parts that still give every multiprocessor work, within the limits.
int64_t split_rows(int64_t num_heads, int64_t S) {
    int64_t rows = kMinSplitRows;
    while (rows < kMaxSplitRows && num_heads * ceil_div(S, rows) > kWantedBlocks) {
        rows *= 2;
    }
    return rows;
}

Split split_of(const ChunkAttentionCall& call) {
    const int64_t num_heads = call.B * call.H, rows = split_rows(num_heads, call.S);
    const int64_t parts = ceil_div(call.S, rows), all_parts = num_heads * parts;
    float* values = static_cast<float*>(call.workspace);
    float* maxima = values + all_parts * call.value_width;
    return {static_cast<int>(rows), static_cast<int>(parts), values, maxima, maxima + all_parts};
}

template <typename Stored>
bool is_aligned(const ChunkAttentionCall& call) {
    constexpr int64_t kBytes = chunk_attention::kAccessBytes, kSize = static_cast<int64_t>(sizeof(Stored));
    const auto fits = [](const void* rows, int64_t width) {
        return reinterpret_cast<uintptr_t>(rows) % kBytes == 0 && width * kSize % kBytes == 0;
    };
    return fits(call.past_key, call.key_width) && fits(call.past_value, call.value_width);
}

template <typename Stored>
int launch_split(const ChunkAttentionCall& call, const Split& split, cudaStream_t stream) {
    const auto kernel = is_aligned<Stored>(call) ? chunk_attention::split_kernel<Stored, true>
                                                 : chunk_attention::split_kernel<Stored, false>;
    const int64_t num_blocks = call.B * call.H * split.num_parts;
    if (num_blocks > kMaxBlocks) return MGD_UNSUPPORTED;
    return status_of(launch_kernel(kernel, num_blocks, chunk_attention::kSplitThreads, stream, call, split));
}

int launch_splits(const ChunkAttentionCall& call, const Split& split, cudaStream_t stream) {
    switch (call.past_dtype) {
        case MGD_FLOAT16:
            return launch_split<__half>(call, split, stream);
        case MGD_BFLOAT16:
            return launch_split<__nv_bfloat16>(call, split, stream);
        case MGD_FLOAT8_E4M3:
            return launch_split<__nv_fp8_e4m3>(call, split, stream);
        case MGD_INT8:
            return launch_split<int8_t>(call, split, stream);
        default:
            return launch_split<float>(call, split, stream);
    }
}

int launch_decode(const ChunkAttentionCall& call, cudaStream_t stream) {
    const int64_t num_blocks = call.B * call.H * ceil_div(call.value_width, kWarpSize);
    if (num_blocks > kMaxBlocks) return MGD_UNSUPPORTED;
    const Split split = split_of(call);
    if (split.num_parts > 0) {
        if (int status = launch_splits(call, split, stream); status != MGD_OK) return status;
    }
    const auto join = chunk_attention::join_kernel;
    return status_of(launch_kernel(join, num_blocks, chunk_attention::kJoinThreads, stream, call, split));
}

int launch_prefill(const ChunkAttentionCall& call, cudaStream_t stream) {
    const int64_t query_tiles = ceil_div(call.T, chunk_attention::kTile);
    const int64_t num_blocks =
        call.B * call.H * query_tiles * ceil_div(call.value_width, chunk_attention::kTileColumns);
    if (num_blocks > kMaxBlocks) return MGD_UNSUPPORTED;
    const auto kernel = chunk_attention::prefill_kernel;
    return status_of(launch_kernel(kernel, num_blocks, chunk_attention::kPrefillThreads, stream, call));
}

}  // namespace

size_t chunk_attention_workspace_bytes(int64_t B, int64_t H, int64_t S, int64_t value_width) {
    // A call with fewer rows may have more parts, never more than this.
    const int64_t most = B * H * ceil_div(S, kMinSplitRows), least = B * H * ceil_div(S, kMaxSplitRows);
    const int64_t parts = std::min(most, std::max(least, kWantedBlocks));
    return static_cast<size_t>(parts) * static_cast<size_t>(value_width + 2) * sizeof(float);
}

int launch_chunk_attention(const ChunkAttentionCall& call, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    return call.T == 1 ? launch_decode(call, cuda_stream) : launch_prefill(call, cuda_stream);
}

}  // namespace megalodon
