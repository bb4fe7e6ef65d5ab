// libcuda of the stand-in for a GPU machine (fake_device.hpp).
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>

#include "fake_device.hpp"

__attribute__((visibility("default"))) megalodon::test::FakeGpuControl fake_gpu_control;

namespace megalodon::test {
namespace {

constexpr Address kDeviceOffset = Address{1} << 56;

struct Block {
    std::vector<char> bytes;
    Address start;
};
std::map<Address, Block> blocks;  // by the first address
int context_depth = 0;            // of the one thread that the tests use it from
std::vector<DeviceStream*> streams;

}  // namespace

void require(bool is_true, const std::string& what) {
    if (!is_true) throw std::logic_error("stand-in: " + what);
}

char* host(Address address, std::size_t bytes) {
    const auto after = blocks.upper_bound(address);
    require(after != blocks.begin(), "an address that was never allocated");
    const auto& [start, block] = *std::prev(after);
    require(address + bytes <= start + block.bytes.size() - kAlignment, "an access behind an allocation");
    return reinterpret_cast<char*>(address - kDeviceOffset);
}
char* host(const void* address, std::size_t bytes) {
    return host(reinterpret_cast<Address>(address), bytes);
}

DeviceStream& stream_of(void* handle) {
    const auto found = std::find(streams.begin(), streams.end(), static_cast<DeviceStream*>(handle));
    require(found != streams.end(), "a stream that there is not");
    return **found;
}

bool has_context() {
    return context_depth > 0;
}

namespace {

CUresult guarded(const std::function<CUresult()>& body) {
    try {
        return has_context() ? body() : CUDA_ERROR_INVALID_CONTEXT;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return CUDA_ERROR_LAUNCH_FAILED;
    }
}

// Calls that wait or take memory break the captures of their thread.
CUresult not_while_capturing(const std::function<CUresult()>& body) {
    return guarded([&] {
        for (DeviceStream* stream : streams) {
            if (!stream->capture) continue;
            stream->is_capture_broken = true;
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
        return body();
    });
}

}  // namespace

CUresult enqueue(void* handle, Work work) {
    return guarded([&] {
        DeviceStream& stream = stream_of(handle);
        (stream.capture ? *stream.capture : stream.queue).push_back(std::move(work));
        return CUDA_SUCCESS;
    });
}

}  // namespace megalodon::test

using namespace megalodon::test;

static CUresult copy_rows(void* stream, Address to, std::size_t to_pitch, Address from, std::size_t from_pitch,
                          std::size_t width, std::size_t rows) {
    return enqueue(stream, [=] {
        for (std::size_t row = 0; row < rows; ++row)
            std::memmove(host(to + row * to_pitch, width), host(from + row * from_pitch, width), width);
    });
}

FAKE_EXPORT CUresult cuInit(unsigned) {
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuGetErrorName(CUresult, const char** name) {
    *name = "CUDA_ERROR_OF_THE_STAND_IN";
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuDeviceGetCount(int* count) {
    *count = 1;
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuDeviceGet(CUdevice* device, int index) {
    *device = index;
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 8 : 9;
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    *context = reinterpret_cast<CUcontext>(&blocks);
    ++fake_gpu_control.num_live;
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuDevicePrimaryCtxRelease(CUdevice) {
    --fake_gpu_control.num_live;
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuCtxPushCurrent(CUcontext) {
    ++context_depth;
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuCtxPopCurrent(CUcontext*) {
    --context_depth;
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuStreamCreate(CUstream* stream, unsigned) {
    streams.push_back(new DeviceStream);
    *stream = reinterpret_cast<CUstream>(streams.back());
    ++fake_gpu_control.num_live;
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuStreamDestroy(CUstream handle) {
    return guarded([&] {
        DeviceStream& stream = stream_of(handle);
        require(!stream.capture, "destroyed while it captures");
        streams.erase(std::find(streams.begin(), streams.end(), &stream));
        delete &stream;
        --fake_gpu_control.num_live;
        return CUDA_SUCCESS;
    });
}
FAKE_EXPORT CUresult cuStreamSynchronize(CUstream handle) {
    ++fake_gpu_control.num_synchronisations;
    return not_while_capturing([&] {
        DeviceStream& stream = stream_of(handle);
        const std::vector<Work> ready = std::move(stream.queue);
        stream.queue.clear();
        for (const Work& work : ready) {
            try {
                if (!stream.has_failed) work();
            } catch (const std::exception& error) {
                std::fprintf(stderr, "%s\n", error.what());
                stream.has_failed = true;  // as a GPU: for ever
            }
        }
        return stream.has_failed ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
    });
}
FAKE_EXPORT CUresult cuMemAlloc(CUdeviceptr* memory, std::size_t bytes) {
    return not_while_capturing([&] {
        Block block{std::vector<char>(bytes + 2 * kAlignment, '\xff'), 0};
        const auto first = reinterpret_cast<Address>(block.bytes.data());
        block.start = (first + kAlignment - 1) / kAlignment * kAlignment + kDeviceOffset;
        *memory = block.start;
        blocks[block.start] = std::move(block);
        ++fake_gpu_control.num_allocations;
        ++fake_gpu_control.num_live;
        return CUDA_SUCCESS;
    });
}
FAKE_EXPORT CUresult cuMemFree(CUdeviceptr memory) {
    return not_while_capturing([&] {
        for (const DeviceStream* stream : streams)
            require(stream->queue.empty() || streams.size() > 1, "freed while work is enqueued");
        require(blocks.erase(memory) == 1, "freed, but not allocated");
        --fake_gpu_control.num_live;
        return CUDA_SUCCESS;
    });
}
FAKE_EXPORT CUresult cuMemsetD8Async(CUdeviceptr memory, unsigned char value, std::size_t bytes, CUstream stream) {
    return enqueue(stream, [=] { std::memset(host(memory, bytes), value, bytes); });
}
// Pageable memory: it is staged at once, and cannot be captured.
FAKE_EXPORT CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, std::size_t bytes, CUstream stream) {
    return not_while_capturing([&] {
        const auto* first = static_cast<const char*>(from);
        const std::vector<char> staged(first, first + bytes);
        return enqueue(stream, [=] { std::copy(staged.begin(), staged.end(), host(to, bytes)); });
    });
}
FAKE_EXPORT CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
    return not_while_capturing([&] { return enqueue(stream, [=] { std::memcpy(to, host(from, bytes), bytes); }); });
}
FAKE_EXPORT CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, CUstream stream) {
    return copy_rows(stream, to, bytes, from, bytes, bytes, 1);
}
FAKE_EXPORT CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D* request, CUstream stream) {
    return copy_rows(stream, request->dstDevice, request->dstPitch, request->srcDevice, request->srcPitch,
                     request->WidthInBytes, request->Height);
}
FAKE_EXPORT CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
    return guarded([&] {
        require(mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, "a capture that disturbs other threads");
        stream_of(stream).capture.emplace();
        return CUDA_SUCCESS;
    });
}
FAKE_EXPORT CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    return guarded([&] {
        DeviceStream& stream = stream_of(handle);
        require(stream.capture.has_value(), "no capture to end");
        const auto captured = std::exchange(stream.capture, std::nullopt);
        if (std::exchange(stream.is_capture_broken, false) || fake_gpu_control.refuses_capture) {
            return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        }
        *graph = reinterpret_cast<CUgraph>(new std::vector<Work>(*captured));
        ++fake_gpu_control.num_live;
        return CUDA_SUCCESS;
    });
}
FAKE_EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    *executable = reinterpret_cast<CUgraphExec>(new std::vector<Work>(*reinterpret_cast<std::vector<Work>*>(graph)));
    ++fake_gpu_control.num_live;
    ++fake_gpu_control.num_captures;
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuGraphDestroy(CUgraph graph) {
    delete reinterpret_cast<std::vector<Work>*>(graph);
    --fake_gpu_control.num_live;
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    ++fake_gpu_control.num_launches;
    for (const Work& work : *reinterpret_cast<std::vector<Work>*>(executable)) {
        if (const CUresult result = enqueue(stream, work); result != CUDA_SUCCESS) return result;
    }
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuGraphExecDestroy(CUgraphExec executable) {
    delete reinterpret_cast<std::vector<Work>*>(executable);
    --fake_gpu_control.num_live;
    return CUDA_SUCCESS;
}
