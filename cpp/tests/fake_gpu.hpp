// What tests see of the stand-in for a GPU machine (fake_device.hpp), by the symbol `fake_gpu_control`.
#pragma once

#include <cstdint>

namespace megalodon::test {

struct FakeGpuControl {
    std::int32_t tensorrt_version = 0;  // as getInferLibVersion gives it
    bool refuses_capture = false;
    bool refuses_calls = false;
    int num_calls = 0;     // that TensorRT enqueued, captured ones included
    int num_captures = 0;  // graphs
    int num_launches = 0;
    int num_synchronisations = 0;
    int num_allocations = 0;
    int num_live = 0;  // allocations, streams, graphs and execution contexts that nobody has given back
};

}  // namespace megalodon::test
