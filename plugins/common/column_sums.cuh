// Sums over the rows of a matrix in a fixed order, so that gradients have the same bits in every run.
#pragma once

#include "common/device.cuh"
#include "common/launch.h"

namespace megalodon {

/// Grid: one block for kColumns columns; kSlices threads share a column's rows.
template <int kColumns, int kSlices>
__global__ void column_sums_kernel(const float* values, int64_t num_rows, int64_t num_columns, int64_t row_stride,
                                   float* sums) {
    MGD_SHARED(double, slice_sums, kColumns* kSlices);
    const int thread = static_cast<int>(threadIdx.x), slice = thread / kColumns;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + thread % kColumns;
    double sum = 0.0;
    for (int64_t row = slice; row < num_rows && column < num_columns; row += kSlices) {
        sum += static_cast<double>(values[row * row_stride + column]);
    }
    slice_sums[thread] = sum;
    __syncthreads();
    if (slice > 0 || column >= num_columns) return;
    for (int other = 1; other < kSlices; ++other) {
        sum += slice_sums[other * kColumns + thread];
    }
    sums[column] = static_cast<float>(sum);
}

/// sums[c] = sum over r of values[r * row_stride + c], accumulated in float64; zero without rows. Returns an
/// mgd_status.
inline int launch_column_sums(const float* values, int64_t num_rows, int64_t num_columns, int64_t row_stride,
                              float* sums, cudaStream_t stream) {
    constexpr int kColumns = 32, kSlices = 8;  // neighbouring lanes read neighbouring columns
    const int64_t num_blocks = ceil_div(num_columns, kColumns);
    if (num_blocks > kMaxBlocks) return MGD_UNSUPPORTED;
    return status_of(launch_kernel(column_sums_kernel<kColumns, kSlices>, num_blocks, kColumns * kSlices, stream,
                                   values, num_rows, num_columns, row_stride, sums));
}

}  // namespace megalodon
