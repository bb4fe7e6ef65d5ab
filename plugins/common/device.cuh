// What several kernels need: activation types, indices, and sums over the lanes of a warp.
#pragma once

#include "common/platform.cuh"

namespace megalodon {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline float to_float(float value) {
    return value;
}
__device__ inline float to_float(__half value) {
    return __half2float(value);
}
__device__ inline float to_float(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

template <typename Activation>
__device__ Activation from_float(float value);

template <>
__device__ inline float from_float<float>(float value) {
    return value;
}

template <>
__device__ inline __half from_float<__half>(float value) {
    return __float2half(value);
}

template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16(value);
}

/// Index of this thread in a one-dimensional grid; more than 2^31 threads are possible.
__device__ inline int64_t thread_in_grid() {
    return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

/// Sum over each aligned run of kLanes lanes; every lane gets it. All 32 lanes must call.
template <int kLanes>
__device__ inline float sum_over_lanes(float value) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(kWholeWarp, value, distance);
    }
    return value;
}

}  // namespace megalodon
