#include "operators/append_rows/launch.h"

#include "common/launch.h"
#include "operators/append_rows/kernel.cuh"

namespace megalodon {

constexpr int kBlockThreads = 128;

int launch_append_rows(const AppendCall& call, void* stream) {
    int64_t num_rows = 0;
    for (int i = 0; i < call.num_tensors; ++i) {
        num_rows += call.B * call.tensors[i].heads * call.T;
    }
    const int64_t num_blocks = ceil_div(num_rows * kWarpSize, kBlockThreads);
    if (num_blocks == 0) return MGD_OK;
    if (num_blocks > kMaxBlocks) return MGD_UNSUPPORTED;
    const auto kernel = append_rows::append_rows_kernel;
    return status_of(launch_kernel(kernel, num_blocks, kBlockThreads, static_cast<cudaStream_t>(stream), call));
}

}  // namespace megalodon
