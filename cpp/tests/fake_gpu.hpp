// What tests see of the stand-in for a GPU machine (fake_device.hpp), by the symbol `fake_gpu_control`.
#pragma once

#include <cstdint>

namespace megalodon::test {

constexpr std::int64_t kStreamingBudget = 4242;  // that TensorRT finds good

struct FakeGpuControl {
    std::int32_t tensorrt_version = 0;  // as getInferLibVersion gives it
    bool refuses_capture = false;
    bool refuses_calls = false;
    bool is_host_code_allowed = false;  // of engines that bring a runtime of their own
    std::int64_t streaming_budget = 0;  // of the engine whose context was made last; -1: none was set
    int num_calls = 0;                  // that TensorRT enqueued, captured ones included
    int num_captures = 0;               // graphs
    int num_launches = 0;
    int num_synchronisations = 0;
    int num_allocations = 0;
    int num_live = 0;  // allocations, streams, graphs and execution contexts that nobody has given back
};

}  // namespace megalodon::test
