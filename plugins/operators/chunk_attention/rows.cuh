// How both kernels see keys and values: rows of numbers of any stored type, read as float.
#pragma once

#include <type_traits>

#include "common/device.cuh"
#include "megalodon/megalodon.h"
#include "operators/chunk_attention/launch.h"

namespace megalodon::chunk_attention {

/// Past rows that row `b` of the batch sees: position mod C, and never more than there are.
__device__ inline int64_t filled_rows(const ChunkAttentionCall& call, int64_t b) {
    const int64_t filled = call.position[b] % call.chunk_size;
    return filled < call.S ? filled : call.S;
}

/// Calls `body` with a null pointer of the stored type that `dtype` names; the same branch for every thread.
template <typename Body>
__device__ inline void with_type(int dtype, Body body) {
    switch (dtype) {
        case MGD_FLOAT16:
            return body(static_cast<const __half*>(nullptr));
        case MGD_BFLOAT16:
            return body(static_cast<const __nv_bfloat16*>(nullptr));
        case MGD_FLOAT8_E4M3:
            return body(static_cast<const __nv_fp8_e4m3*>(nullptr));
        case MGD_INT8:
            return body(static_cast<const int8_t*>(nullptr));
        default:
            return body(static_cast<const float*>(nullptr));
    }
}

/// `kCount` neighbours from `source` on; with kAligned one access, else one for each that is below `num_left`, the rest
/// being 0.
template <bool kAligned, int kCount, typename Element>
__device__ inline void load_floats(const Element* source, int num_left, float (&values)[kCount]) {
    if constexpr (kAligned) {
        to_floats(*reinterpret_cast<const Packed<Element, kCount>*>(source), values);
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            float one[1] = {0.0f};
            if (i < num_left) to_floats(Packed<Element, 1>{source[i]}, one);
            values[i] = one[0];
        }
    }
}

/// One number of a tensor of type `dtype`.
__device__ inline float load_float(int dtype, const void* tensor, int64_t index) {
    float value[1];
    with_type(dtype, [&](auto* type) {
        using Element = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
        load_floats<true>(static_cast<const Element*>(tensor) + index, 1, value);
    });
    return value[0];
}

/// Rounds to an activation type.
__device__ inline void store_float(int dtype, void* tensor, int64_t index, float value) {
    if (dtype == MGD_FLOAT16) {
        static_cast<__half*>(tensor)[index] = from_float<__half>(value);
    } else if (dtype == MGD_BFLOAT16) {
        static_cast<__nv_bfloat16*>(tensor)[index] = from_float<__nv_bfloat16>(value);
    } else {
        static_cast<float*>(tensor)[index] = value;
    }
}

}  // namespace megalodon::chunk_attention
