// Shows that the emulation notices broken kernels: without that, kernels that pass under it would prove nothing.
// Prints each failure; exit code 1 if there was one.
#include <cmath>
#include <cstdio>
#include <vector>

#include "common/device.cuh"

extern "C" void mgd_emulate_order(int64_t order);
extern "C" void mgd_emulate_failure(int64_t launches);

namespace {

constexpr int kThreads = 96, kBlocks = 3;
constexpr int64_t kOrders[] = {0, 1, 12345};

int num_failures = 0;

void expect(bool holds, const char* what, int line) {
    if (holds) return;
    std::printf("emulation_check.cpp:%d: %s\n", line, what);
    ++num_failures;
}

#define EXPECT(condition) expect((condition), #condition, __LINE__)

/// Every thread reads what another wrote; kBarrier says whether they wait for each other in between.
template <bool kBarrier>
__global__ void reverse_kernel(float* out) {
    MGD_SHARED(float, values, kThreads);
    const int thread = static_cast<int>(threadIdx.x);
    values[thread] = static_cast<float>(megalodon::thread_in_grid());
    if (kBarrier) __syncthreads();
    out[megalodon::thread_in_grid()] = values[kThreads - 1 - thread];
}

/// The second barrier is what keeps a fast thread's next value from a slow thread's read.
template <bool kSecondBarrier>
__global__ void broadcast_twice_kernel(float* out) {
    MGD_SHARED(float, value, 1);
    float sum = 0;
    for (int round = 1; round <= 2; ++round) {
        if (threadIdx.x == 0) value[0] = static_cast<float>(round);
        __syncthreads();
        sum += value[0];
        if (kSecondBarrier) __syncthreads();
    }
    out[megalodon::thread_in_grid()] = sum;
}

__global__ void barrier_for_some_kernel(float* out) {
    if (threadIdx.x < 40) __syncthreads();
    out[megalodon::thread_in_grid()] = 1;
}

__global__ void sum_kernel(float* out) {
    const float lane = static_cast<float>(threadIdx.x % 32);
    out[megalodon::thread_in_grid()] = megalodon::sum_over_lanes<32>(lane) + megalodon::sum_over_lanes<4>(lane);
}

__global__ void shift_kernel(double* out) {
    out[megalodon::thread_in_grid()] = __shfl_up_sync(~0u, static_cast<double>(threadIdx.x), 3);
}

__global__ void mask_without_caller_kernel(float* out) {
    out[megalodon::thread_in_grid()] = __shfl_xor_sync(0x0000ffffu, 1.0f, 1);
}

__global__ void mask_with_absent_lanes_kernel(float* out) {
    if (threadIdx.x % 32 < 16) out[megalodon::thread_in_grid()] = __shfl_xor_sync(~0u, 1.0f, 1);
}

__global__ void source_outside_mask_kernel(float* out) {
    if (threadIdx.x % 32 < 16) out[megalodon::thread_in_grid()] = __shfl_xor_sync(0x0000ffffu, 1.0f, 16);
}

template <typename Value>
struct Run {
    cudaError_t error;
    std::vector<Value> out = std::vector<Value>(kThreads * kBlocks, Value(-1));
    explicit Run(void (*kernel)(Value*)) {
        error = megalodon::launch_kernel(kernel, kBlocks, kThreads, nullptr, out.data());
    }
    /// Whether element i is expected(thread, block) everywhere; NaN is not.
    template <typename Expected>
    bool equals(Expected expected) const {
        bool equal = error == cudaSuccess;
        for (int i = 0; i < kThreads * kBlocks; ++i) {
            equal = equal && out[i] == Value(expected(i % kThreads, i / kThreads));
        }
        return equal;
    }
};

__global__ void empty_kernel() {}

cudaError_t launch_empty(int64_t num_blocks, int block_threads) {
    return megalodon::launch_kernel(empty_kernel, num_blocks, block_threads, nullptr);
}

/// Whether every order gives the expected values, in which case a kernel passes.
template <typename Value, typename Expected>
bool passes(void (*kernel)(Value*), Expected expected) {
    bool equal = true;
    for (const int64_t order : kOrders) {
        mgd_emulate_order(order);
        equal = Run<Value>(kernel).equals(expected) && equal;
    }
    return equal;
}

}  // namespace

int main() {
    const auto reversed = [](int thread, int block) { return block * kThreads + kThreads - 1 - thread; };
    EXPECT(passes(reverse_kernel<true>, reversed));
    EXPECT(!passes(reverse_kernel<false>, reversed));
    const auto three = [](int, int) { return 3; };
    EXPECT(passes(broadcast_twice_kernel<true>, three));
    EXPECT(!passes(broadcast_twice_kernel<false>, three));
    EXPECT(passes(sum_kernel, [](int thread, int) { return 31 * 16 + 4 * (thread % 32 / 4 * 4) + 6; }));
    EXPECT(passes(shift_kernel, [](int thread, int) { return thread % 32 < 3 ? thread : thread - 3; }));
    EXPECT(Run<float>(barrier_for_some_kernel).error != cudaSuccess);
    EXPECT(Run<float>(mask_without_caller_kernel).error != cudaSuccess);
    EXPECT(Run<float>(mask_with_absent_lanes_kernel).error != cudaSuccess);
    const Run<float> outside(source_outside_mask_kernel);
    EXPECT(outside.error == cudaSuccess && std::isnan(outside.out[0]));
    EXPECT(passes(sum_kernel, [](int thread, int) { return 31 * 16 + 4 * (thread % 32 / 4 * 4) + 6; }));  // recovered
    EXPECT(launch_empty(1, 1024) == cudaSuccess);
    EXPECT(launch_empty(0, 32) == cudaErrorInvalidConfiguration);
    EXPECT(launch_empty(int64_t{1} << 31, 32) == cudaErrorInvalidConfiguration);
    EXPECT(launch_empty(1, 0) == cudaErrorInvalidConfiguration);
    EXPECT(launch_empty(1, 1025) == cudaErrorInvalidConfiguration);
    mgd_emulate_failure(1);
    EXPECT(launch_empty(1, 1) == cudaSuccess);
    EXPECT(launch_empty(1, 1) == cudaErrorLaunchOutOfResources);
    EXPECT(launch_empty(1, 1) == cudaSuccess);
    std::printf("%d failures\n", num_failures);
    return num_failures == 0 ? 0 : 1;
}
