// Apart from the kernels: what the CUDA runtime says needs no CUDA compiler.
#ifdef MEGALODON_EMULATE
#include "emulation/cuda.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "common/launch.h"

namespace megalodon {

const char* cuda_error_string(int cuda_error) {
    return cudaGetErrorString(static_cast<cudaError_t>(cuda_error));
}

}  // namespace megalodon
