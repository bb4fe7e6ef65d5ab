#include "emulation/cuda.h"

#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

namespace megalodon::emulation {

Index thread_index, block_index, block_size;
int num_multiprocessors = 1;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int64_t kMostBlocks = INT32_MAX;  // of a one-dimensional grid
constexpr int kMostThreads = 1024;          // of a block
constexpr int kWarpSize = 32;
constexpr uint64_t kNanBits = ~uint64_t{0};  // NaN as float, as double and as two floats

enum class Wait { kNothing, kBarrier, kExchange, kDone };

/// One CUDA thread.
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
    void* sanitizer_state = nullptr;
    Wait wait = Wait::kNothing;
    unsigned mask = 0;
    int source_lane = 0;
    uint64_t bits = 0;  // given before an exchange, got after it
};

struct SharedMemory {
    void* memory;
    size_t size_bytes;
};

/// The one block that runs. Guarded by the mutex of run_grid.
struct Machine {
    std::vector<Fiber> fibers;  // kept from one block to the next: their stacks are
    int num_threads = 0;
    int current = 0;
    ucontext_t scheduler;
    const void* scheduler_stack = nullptr;  // known to AddressSanitizer's builds alone, like its size
    size_t scheduler_stack_bytes = 0;
    void* sanitizer_state = nullptr;
    const std::function<void()>* thread = nullptr;
    std::vector<SharedMemory> shared;
    int64_t order = 0;
    std::mt19937_64 random;
    int64_t launches_left = -1;  // until one fails; negative: none does
};

Machine machine;

// AddressSanitizer must be told of every change of stack: before it, and after it on the other side.
#ifdef __SANITIZE_ADDRESS__
void leave_stack(void** state, const void* to_stack, size_t to_bytes) {
    __sanitizer_start_switch_fiber(state, to_stack, to_bytes);
}
void enter_stack(void* state, const void** from_stack = nullptr, size_t* from_bytes = nullptr) {
    __sanitizer_finish_switch_fiber(state, from_stack, from_bytes);
}
/// A fiber that a failed block left behind has not taken its marks off the stack.
void clean_stack(Fiber& fiber) {
    __asan_unpoison_memory_region(fiber.stack.get(), kStackBytes);
}
#else
void leave_stack(void**, const void*, size_t) {}
void enter_stack(void*, const void** = nullptr, size_t* = nullptr) {}
void clean_stack(Fiber&) {}
#endif

void yield_until(Wait wait) {
    Fiber& fiber = machine.fibers[machine.current];
    fiber.wait = wait;
    void** state = wait == Wait::kDone ? nullptr : &fiber.sanitizer_state;  // none: the fiber does not come back
    leave_stack(state, machine.scheduler_stack, machine.scheduler_stack_bytes);
    swapcontext(&fiber.context, &machine.scheduler);
    enter_stack(fiber.sanitizer_state);
}

void resume(Fiber& fiber) {
    leave_stack(&machine.sanitizer_state, fiber.stack.get(), kStackBytes);
    swapcontext(&machine.scheduler, &fiber.context);
    enter_stack(machine.sanitizer_state);
}

void fiber_main() {
    enter_stack(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
    (*machine.thread)();
    yield_until(Wait::kDone);
}

void prepare_fiber(Fiber& fiber) {
    clean_stack(fiber);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.wait = Wait::kNothing;
}

/// Indices 0..count-1 in the order that mgd_emulate_order chose.
std::vector<int64_t> ordered(int64_t count) {
    std::vector<int64_t> indices(count);
    std::iota(indices.begin(), indices.end(), 0);
    if (machine.order == 1) std::reverse(indices.begin(), indices.end());
    if (machine.order > 1) std::shuffle(indices.begin(), indices.end(), machine.random);
    return indices;
}

/// Runs every thread of `first` .. `first + count` that waits for nothing up to its next wait; false if there was none.
bool run_ready_threads(int first, int count) {
    bool has_run = false;
    for (const int64_t index : ordered(count)) {
        const int thread = first + static_cast<int>(index);
        if (machine.fibers[thread].wait != Wait::kNothing) continue;
        machine.current = thread;
        thread_index.x = static_cast<unsigned>(thread);
        resume(machine.fibers[thread]);
        has_run = true;
    }
    return has_run;
}

bool all_wait_for(Wait wait) {
    const auto waits = [wait](const Fiber& fiber) { return fiber.wait == wait; };
    return std::all_of(machine.fibers.begin(), machine.fibers.begin() + machine.num_threads, waits);
}

/// Completes an exchange of the warp whose first thread is `first`, if all lanes of its mask are there and agree.
bool finish_exchange(int first) {
    const int num_lanes = std::min(kWarpSize, machine.num_threads - first);
    Fiber* lanes = &machine.fibers[first];
    for (int lane = 0; lane < num_lanes; ++lane) {
        if (lanes[lane].wait != Wait::kExchange) continue;
        const unsigned mask = lanes[lane].mask;
        uint64_t given[kWarpSize];
        std::fill(std::begin(given), std::end(given), kNanBits);
        bool complete = mask >> lane & 1;
        for (int other = 0; other < kWarpSize; ++other) {
            if (!(mask >> other & 1)) continue;
            complete =
                complete && other < num_lanes && lanes[other].wait == Wait::kExchange && lanes[other].mask == mask;
            if (complete) given[other] = lanes[other].bits;
        }
        if (!complete) continue;
        for (int other = 0; other < num_lanes; ++other) {
            if (!(mask >> other & 1)) continue;
            const int source = lanes[other].source_lane;
            lanes[other].bits = source >= 0 && source < kWarpSize ? given[source] : kNanBits;
            lanes[other].wait = Wait::kNothing;
        }
        return true;
    }
    return false;
}

/// Every warp runs as far as it can before the next one: a warp that does not wait for the others is far ahead of them.
bool run_warps_apart() {
    bool any = false;
    for (const int64_t warp : ordered((machine.num_threads + kWarpSize - 1) / kWarpSize)) {
        const int first = static_cast<int>(warp) * kWarpSize;
        const int num_lanes = std::min(kWarpSize, machine.num_threads - first);
        while (run_ready_threads(first, num_lanes) | finish_exchange(first))
            any = true;
    }
    return any;
}

/// All warps take one step each, from wait to wait.
bool run_warps_together() {
    bool any = run_ready_threads(0, machine.num_threads);
    for (int first = 0; first < machine.num_threads; first += kWarpSize) {
        any = finish_exchange(first) || any;
    }
    return any;
}

/// Runs one block to its end; false when its threads wait for each other for ever.
bool run_block() {
    for (const SharedMemory& shared : machine.shared) {
        std::memset(shared.memory, 0xff, shared.size_bytes);
    }
    for (int thread = 0; thread < machine.num_threads; ++thread) {
        prepare_fiber(machine.fibers[thread]);
    }
    while (!all_wait_for(Wait::kDone)) {
        const bool has_run = machine.order > 1 ? run_warps_together() : run_warps_apart();
        if (all_wait_for(Wait::kBarrier)) {
            for (int thread = 0; thread < machine.num_threads; ++thread) {
                machine.fibers[thread].wait = Wait::kNothing;
            }
        } else if (!has_run) {
            return false;
        }
    }
    return true;
}

std::mutex& machine_mutex() {
    static std::mutex mutex;
    return mutex;
}

}  // namespace

void synchronise_threads() {
    yield_until(Wait::kBarrier);
}

int current_lane() {
    return machine.current % kWarpSize;
}

uint64_t exchange(unsigned mask, uint64_t bits, int source_lane) {
    Fiber& fiber = machine.fibers[machine.current];
    fiber.mask = mask;
    fiber.bits = bits;
    fiber.source_lane = source_lane;
    yield_until(Wait::kExchange);
    return fiber.bits;
}

void register_shared(void* memory, size_t size_bytes) {
    machine.shared.push_back({memory, size_bytes});
    std::memset(memory, 0xff, size_bytes);
}

cudaError_t run_grid(int64_t num_blocks, int block_threads, const std::function<void()>& thread) {
    const std::lock_guard<std::mutex> lock(machine_mutex());
    if (num_blocks < 1 || num_blocks > kMostBlocks || block_threads < 1 || block_threads > kMostThreads) {
        return cudaErrorInvalidConfiguration;
    }
    if (machine.launches_left >= 0 && machine.launches_left-- == 0) return cudaErrorLaunchOutOfResources;
    machine.num_threads = block_threads;
    machine.thread = &thread;
    if (machine.fibers.size() < static_cast<size_t>(block_threads)) machine.fibers.resize(block_threads);
    block_size.x = static_cast<unsigned>(block_threads);
    for (const int64_t block : ordered(num_blocks)) {
        block_index.x = static_cast<unsigned>(block);
        if (!run_block()) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

}  // namespace megalodon::emulation

const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidConfiguration:
            return "emulation: a grid or a block that no GPU takes";
        case cudaErrorLaunchOutOfResources:
            return "emulation: this launch was to fail";
        default:
            return "emulation: threads wait for each other, or a shuffle's lanes disagree";
    }
}

/// Order of the threads and blocks of later launches: 0 ascending, 1 descending, any other number seeds a random one.
extern "C" __attribute__((visibility("default"))) void mgd_emulate_order(int64_t order) {
    const std::lock_guard<std::mutex> lock(megalodon::emulation::machine_mutex());
    megalodon::emulation::machine.order = order;
    megalodon::emulation::machine.random.seed(static_cast<uint64_t>(order));
}

/// After so many launches one fails; none does when the number is negative.
extern "C" __attribute__((visibility("default"))) void mgd_emulate_failure(int64_t launches) {
    const std::lock_guard<std::mutex> lock(megalodon::emulation::machine_mutex());
    megalodon::emulation::machine.launches_left = launches;
}

/// Size of the device that launchers see: how they split work depends on it.
extern "C" __attribute__((visibility("default"))) void mgd_emulate_multiprocessors(int count) {
    megalodon::emulation::num_multiprocessors = count;
}
