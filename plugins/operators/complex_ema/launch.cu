#include "operators/complex_ema/launch.h"

#include "common/launch.h"
#include "operators/complex_ema/walk.cuh"

namespace megalodon {
namespace {

using complex_ema::Layout;
using complex_ema::Segments;

// Up to here tokens are taken one after another without shared memory.
constexpr int64_t kFewTokens = 4;
constexpr int kBlockThreads = 128;

// Segments. A walk keeps a scheduler busy with one warp (four independent modes for each thread, six operations each,
// on a chain of two), so rows are cut only as far as each warp still has a scheduler of its own; every architecture
// from sm_75 on has four of them in a multiprocessor. A cut costs a second walk for the states, 4 operations where the
// first has 6, so that two segments take 5/6 of the time; and two more launches, which last as long as the walk of
// about 256 tokens (2 us each; a token is 24 operations and 3 for loads and sums, 15 ns).
constexpr int64_t kSchedulers = 4;
constexpr int64_t kSmallestSegment = 256;
constexpr int64_t kMostMultiprocessors = 256;  // bounds the workspace, which is asked for without a device

template <typename Layout>
int64_t num_walks(const ComplexEmaInputs& in) {
    return in.B * ceil_div(in.D, Layout::kChannels);
}

template <typename Layout>
Segments choose_segments(const ComplexEmaCall& call) {
    const int64_t num_warps = num_walks<Layout>(call.in) * Layout::kThreads / kWarpSize;
    const int64_t state_bytes = call.in.B * call.in.D * call.in.N * kComplexParts * static_cast<int64_t>(sizeof(float));
    int64_t num = smaller(kSchedulers * multiprocessor_count() / num_warps, call.in.T / kSmallestSegment);
    num = smaller(num, 1 + static_cast<int64_t>(call.workspace_bytes) / state_bytes);
    if (num < 2) return {1, call.in.T, nullptr};
    const int64_t tokens = ceil_div(call.in.T, num);
    return {ceil_div(call.in.T, tokens), tokens, static_cast<float*>(call.workspace)};
}

template <typename Layout>
int launch_few_tokens(const ComplexEmaCall& call, cudaStream_t stream) {
    const int64_t num_blocks = ceil_div(call.in.B * call.in.D * Layout::kLanes, kBlockThreads);
    if (num_blocks > kMaxBlocks) return MGD_UNSUPPORTED;
    const auto kernel = complex_ema::few_tokens_kernel<Layout>;
    return status_of(launch_kernel(kernel, num_blocks, kBlockThreads, stream, call));
}

template <typename Layout>
int launch_walk(const ComplexEmaCall& call, cudaStream_t stream) {
    const Segments segments = choose_segments<Layout>(call);
    const int64_t num_blocks = num_walks<Layout>(call.in);
    if (num_blocks * segments.num > kMaxBlocks) return MGD_UNSUPPORTED;
    if (segments.num > 1) {  // so few blocks that those of the modes cannot be too many
        const int64_t num_modes = call.in.B * call.in.D * call.in.N;
        const auto states = complex_ema::walk_kernel<Layout, false>;
        const int64_t state_blocks = num_blocks * (segments.num - 1);
        int status = status_of(launch_kernel(states, state_blocks, Layout::kThreads, stream, call, segments));
        if (status != MGD_OK) return status;
        status = status_of(launch_kernel(complex_ema::join_segments_kernel, ceil_div(num_modes, kBlockThreads),
                                         kBlockThreads, stream, call, segments));
        if (status != MGD_OK) return status;
    }
    const auto outputs = complex_ema::walk_kernel<Layout, true>;
    return status_of(launch_kernel(outputs, num_blocks * segments.num, Layout::kThreads, stream, call, segments));
}

}  // namespace

size_t complex_ema_workspace_bytes(int64_t B, int64_t T, int64_t D, int64_t N) {
    if (T < 2 * kSmallestSegment || N < 1 || N > MGD_MAX_MODES) return 0;
    // Rows times segments times lanes fit the schedulers of the largest device; no call of fewer rows, tokens or
    // channels needs more.
    const int64_t lanes = complex_ema::with_layout(N, [](auto layout) { return decltype(layout)::kLanes; });
    const int64_t most_channels = kSchedulers * kMostMultiprocessors * kWarpSize / lanes;
    const int64_t channels = smaller(B * D * (T / kSmallestSegment - 1), most_channels);
    return static_cast<size_t>(channels * N) * kComplexParts * sizeof(float);
}

int launch_complex_ema(const ComplexEmaCall& call, void* stream) {
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    return complex_ema::with_layout(call.in.N, [&](auto layout) {
        using Layout = decltype(layout);
        return call.in.T <= kFewTokens ? launch_few_tokens<Layout>(call, cuda_stream)
                                       : launch_walk<Layout>(call, cuda_stream);
    });
}

}  // namespace megalodon
