// Packs: 16 bytes of neighbouring numbers, moved by one instruction where the address allows.
#pragma once

#include "common/device.cuh"

namespace megalodon {

template <typename Value>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(Value));

/// kSize may be 1, for kernels that also run where packs are not aligned.
template <typename Value, int kSize = kPackSize<Value>>
using Pack = Packed<Value, kSize>;

/// Whether every pack of a tensor that starts at `tensor` and whose innermost axis has `stride` elements is aligned.
template <typename Value>
__host__ __device__ inline bool has_aligned_packs(const Value* tensor, int64_t stride) {
    return reinterpret_cast<uintptr_t>(tensor) % sizeof(Pack<Value>) == 0 && stride % kPackSize<Value> == 0;
}

/// The pack at `source`, of which `available` elements exist (any number, negative too); the others are zero.
template <typename Value>
__device__ inline Pack<Value> load_pack(const Value* source, int64_t available, bool is_aligned) {
    if (is_aligned && available >= kPackSize<Value>) return *reinterpret_cast<const Pack<Value>*>(source);
    Pack<Value> pack;
#pragma unroll
    for (int i = 0; i < kPackSize<Value>; ++i) {
        pack.elements[i] = i < available ? source[i] : Value();
    }
    return pack;
}

/// Writes those of the pack's elements that `target` has room for.
template <typename Value>
__device__ inline void store_pack(Value* target, const Pack<Value>& pack, int64_t available, bool is_aligned) {
    if (is_aligned && available >= kPackSize<Value>) {
        *reinterpret_cast<Pack<Value>*>(target) = pack;
        return;
    }
#pragma unroll
    for (int i = 0; i < kPackSize<Value>; ++i) {
        if (i < available) target[i] = pack.elements[i];
    }
}

/// kCount neighbouring floats, a multiple of a pack, as `load_pack`.
template <int kCount>
__device__ inline void load_floats(const float* source, int64_t available, bool is_aligned, float (&values)[kCount]) {
    static_assert(kCount % kPackSize<float> == 0);
#pragma unroll
    for (int first = 0; first < kCount; first += kPackSize<float>) {
        const Pack<float> pack = load_pack(source + first, available - first, is_aligned);
#pragma unroll
        for (int i = 0; i < kPackSize<float>; ++i) {
            values[first + i] = pack.elements[i];
        }
    }
}

template <int kCount>
__device__ inline void store_floats(float* target, const float (&values)[kCount], int64_t available, bool is_aligned) {
    static_assert(kCount % kPackSize<float> == 0);
#pragma unroll
    for (int first = 0; first < kCount; first += kPackSize<float>) {
        Pack<float> pack;
#pragma unroll
        for (int i = 0; i < kPackSize<float>; ++i) {
            pack.elements[i] = values[first + i];
        }
        store_pack(target + first, pack, available - first, is_aligned);
    }
}

}  // namespace megalodon
