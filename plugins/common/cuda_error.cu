#include "common/launch.h"
#include "common/platform.cuh"

namespace megalodon {

const char* cuda_error_string(int cuda_error) {
    return cudaGetErrorString(static_cast<cudaError_t>(cuda_error));
}

}  // namespace megalodon
