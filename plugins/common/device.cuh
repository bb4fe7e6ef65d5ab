// What several kernels need: types in memory, indices, and sums over the lanes of a warp.
#pragma once

#include "common/platform.cuh"
#include "megalodon/megalodon.h"

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
__device__ inline float to_float(int8_t value) {
    return static_cast<float>(value);
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

/// kCount neighbouring elements, read with one access.
template <typename Element, int kCount>
struct alignas(sizeof(Element) * kCount) Packed {
    Element elements[kCount];
};

template <typename Element, int kCount>
__device__ inline void to_floats(const Packed<Element, kCount>& packed, float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        values[i] = to_float(packed.elements[i]);
    }
}

/// By pairs: one instruction converts two.
template <int kCount>
__device__ inline void to_floats(const Packed<__nv_fp8_e4m3, kCount>& packed, float (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
        const unsigned high = i + 1 < kCount ? packed.elements[i + 1].__x : 0;
        const auto pair = static_cast<uint16_t>(packed.elements[i].__x | high << 8);
        const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
        values[i] = to_float(__ushort_as_half(halves.x));
        if (i + 1 < kCount) values[i + 1] = to_float(__ushort_as_half(halves.y));
    }
}

/// Calls use(Activation()) with the type that an mgd_dtype names: for kernels with so much else in them that one for
/// each type is not worth it. The branches are the same for all threads.
template <typename Use>
__device__ inline void with_activation(int dtype, Use use) {
    if (dtype == MGD_FLOAT32) {
        use(float());
    } else if (dtype == MGD_FLOAT16) {
        use(__half());
    } else {
        use(__nv_bfloat16());
    }
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

/// Largest of each aligned run of kLanes lanes; every lane gets it. All 32 lanes must call.
template <int kLanes>
__device__ inline float max_over_lanes(float value) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, distance));
    }
    return value;
}

/// Adds up every sums[k] over each aligned run of kLanes lanes and shares the totals out: lane l of the run is left
/// with those of k = l * kShare .. in sums[0 .. kShare), kShare = kCount / kLanes. With fewer sums than lanes, kLanes /
/// kCount neighbouring lanes get the same one. `lane` is the index within the run. All 32 lanes must call. Every total
/// is added up in the same order.
template <int kLanes, int kCount, int kTotal>
__device__ inline void share_sums_over_lanes(float (&sums)[kTotal], int lane) {
    constexpr int kDistance = kLanes / 2;
    if constexpr (kDistance > 0 && kCount > 1) {
        constexpr int kHalf = kCount / 2;
        const bool takes_upper = (lane & kDistance) != 0;
#pragma unroll
        for (int k = 0; k < kHalf; ++k) {
            const float kept = takes_upper ? sums[k + kHalf] : sums[k];
            const float given = takes_upper ? sums[k] : sums[k + kHalf];
            sums[k] = kept + __shfl_xor_sync(kWholeWarp, given, kDistance);
        }
        share_sums_over_lanes<kDistance, kHalf>(sums, lane);
    } else {
        sums[0] = sum_over_lanes<kLanes>(sums[0]);
    }
}

template <typename Number>
__host__ __device__ inline Number smaller(Number one, Number other) {
    return one < other ? one : other;
}

}  // namespace megalodon
