// append_rows: copies new rows of many tensors to where each row of the batch stands in its memory. A warp for each
// row.
#pragma once

#include "common/device.cuh"
#include "operators/append_rows/launch.h"

namespace megalodon::append_rows {

/// Bytes of one access: the widest that divides everything.
struct alignas(16) Unit16 {
    uint64_t words[2];
};

template <typename Unit>
__device__ inline bool fits(const mgd_append& tensor) {
    const uint64_t bits = reinterpret_cast<uintptr_t>(tensor.rows) | reinterpret_cast<uintptr_t>(tensor.memory) |
                          static_cast<uint64_t>(tensor.row_bytes);
    return bits % sizeof(Unit) == 0;
}

template <typename Unit>
__device__ inline void copy_row(const mgd_append& tensor, int64_t source, int64_t target, int lane) {
    const int64_t num_units = tensor.row_bytes / static_cast<int64_t>(sizeof(Unit));
    const Unit* from = static_cast<const Unit*>(tensor.rows) + source * num_units;
    Unit* to = static_cast<Unit*>(tensor.memory) + target * num_units;
#pragma unroll 4
    for (int64_t i = lane; i < num_units; i += kWarpSize) {
        to[i] = from[i];
    }
}

/// Grid: a warp for each row [B, heads, T] of each tensor, the tensors one after the other.
__global__ void append_rows_kernel(AppendCall call) {
    int64_t row = thread_in_grid() / kWarpSize;
    int index = 0;
    while (index < call.num_tensors && row >= call.B * call.tensors[index].heads * call.T) {
        row -= call.B * call.tensors[index].heads * call.T;
        ++index;
    }
    if (index == call.num_tensors) return;
    const mgd_append& tensor = call.tensors[index];
    const int64_t t = row % call.T, batch_head = row / call.T, b = batch_head / tensor.heads;
    const int64_t target = call.position[b] % call.chunk_size + t;
    if (target >= call.S) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int64_t memory_row = batch_head * call.S + target;
    if (fits<Unit16>(tensor)) {
        copy_row<Unit16>(tensor, row, memory_row, lane);
    } else if (fits<uint32_t>(tensor)) {
        copy_row<uint32_t>(tensor, row, memory_row, lane);
    } else if (fits<uint16_t>(tensor)) {
        copy_row<uint16_t>(tensor, row, memory_row, lane);
    } else {
        copy_row<uint8_t>(tensor, row, memory_row, lane);
    }
}

}  // namespace megalodon::append_rows
