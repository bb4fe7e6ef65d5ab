// CUDA, or its emulation on the CPU: kernels and launchers take both from here and name neither.
#pragma once

#include <cstdint>

#ifdef MEGALODON_EMULATE
#include "emulation/cuda.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

// An array in the block's shared memory. The emulation fills it with NaN before each block.
#define MGD_SHARED(Type, name, count) __shared__ Type name[count]

namespace megalodon {

/// Starts `kernel` and returns the error of the launch itself; an error of the run shows at the next synchronisation.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t num_blocks, int block_threads, cudaStream_t stream,
                          Arguments... arguments) {
    kernel<<<static_cast<unsigned>(num_blocks), block_threads, 0, stream>>>(arguments...);
    return cudaGetLastError();
}

/// Multiprocessors of the calling thread's current device, 0 when it cannot be asked.
inline int multiprocessor_count() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return error == cudaSuccess ? count : 0;
}

}  // namespace megalodon

#endif
