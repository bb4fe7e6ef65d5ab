// What the parts of the stand-in for a GPU machine share: device memory, and streams of work on it.
//
// libcuda, libmegalodon and TensorRT in one library, each as far as the runtime calls it, over the model of
// fake_engine.cpp. Work is only noted down when it is enqueued and done when somebody waits for it, as late as a real
// GPU may do it. Device memory cannot be read by the program, begins as NaN, and every access is checked; a call
// without the GPU's context fails, as does one that breaks a capture.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "fake_gpu.hpp"

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" megalodon::test::FakeGpuControl fake_gpu_control;

namespace megalodon::test {

using Work = std::function<void()>;
using Address = unsigned long long;

constexpr Address kAlignment = 256;

struct DeviceStream {
    std::vector<Work> queue;
    std::optional<std::vector<Work>> capture;
    bool is_capture_broken = false;
    bool has_failed = false;
};

void require(bool is_true, const std::string& what);

// The memory behind a device address, of which `bytes` are used.
char* host(Address address, std::size_t bytes);
char* host(const void* address, std::size_t bytes);

DeviceStream& stream_of(void* handle);
bool has_context();

// CUDA_SUCCESS, or what a call without the context gets.
CUresult enqueue(void* stream, Work work);

}  // namespace megalodon::test
