// The part of CUDA that our kernels use, on the CPU: a fiber for each thread of a block, blocks one after another.
//
// It checks what a GPU would not: a barrier that some threads never reach, a shuffle whose lanes disagree on the mask
// or read from outside it, shared memory read before it is written (it holds NaN), and results that depend on the order
// in which threads run (mgd_emulate_order changes it). As on a GPU, a grid without blocks is an error; any launch can
// be made to fail (mgd_emulate_failure). Not emulated: inline PTX, atomics, asynchronous copies, textures.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "emulation/half.h"

#define __global__
#define __device__
#define __host__
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct float2 {
    float x, y;
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorLaunchOutOfResources = 701,
    cudaErrorLaunchFailure = 719
};
const char* cudaGetErrorString(cudaError_t error);

namespace megalodon::emulation {

struct Index {
    unsigned x = 0;
};

extern Index thread_index, block_index, block_size;

/// Waits for every thread of the block.
void synchronise_threads();

/// Every lane of `mask` gives `bits` and gets those of `source_lane`. A lane outside the warp or the mask gives NaN
/// bits.
uint64_t exchange(unsigned mask, uint64_t bits, int source_lane);
int current_lane();

/// Memory that is filled with NaN before each block.
void register_shared(void* memory, size_t size_bytes);

template <typename Type, int kCount>
struct Shared {
    alignas(alignof(Type)) unsigned char memory[sizeof(Type) * kCount];
    Shared() { register_shared(memory, sizeof(memory)); }
    Type* get() { return reinterpret_cast<Type*>(memory); }
};

template <typename Value>
Value shuffle(unsigned mask, Value value, int source_lane) {
    static_assert(sizeof(Value) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(Value));
    bits = exchange(mask, bits, source_lane);
    std::memcpy(&value, &bits, sizeof(Value));
    return value;
}

/// Of the emulated device; mgd_emulate_multiprocessors changes it.
extern int num_multiprocessors;

cudaError_t run_grid(int64_t num_blocks, int block_threads, const std::function<void()>& thread);

}  // namespace megalodon::emulation

#define threadIdx (::megalodon::emulation::thread_index)
#define blockIdx (::megalodon::emulation::block_index)
#define blockDim (::megalodon::emulation::block_size)

// Blocks run one after another, so one static array serves them all.
#define MGD_SHARED(Type, name, count)                                  \
    static ::megalodon::emulation::Shared<Type, count> name##_storage; \
    Type* const name = name##_storage.get()

inline void __syncthreads() {
    megalodon::emulation::synchronise_threads();
}

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int distance) {
    return megalodon::emulation::shuffle(mask, value, megalodon::emulation::current_lane() ^ distance);
}

/// As in CUDA, the lowest lanes keep their own value.
template <typename Value>
Value __shfl_up_sync(unsigned mask, Value value, int distance) {
    const int lane = megalodon::emulation::current_lane();
    return megalodon::emulation::shuffle(mask, value, lane < distance ? lane : lane - distance);
}

namespace megalodon {

/// Runs the whole grid before it returns, whatever the stream.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int64_t num_blocks, int block_threads, cudaStream_t,
                          Arguments... arguments) {
    return emulation::run_grid(num_blocks, block_threads, [=] { kernel(arguments...); });
}

inline int multiprocessor_count() {
    return emulation::num_multiprocessors;
}

}  // namespace megalodon
