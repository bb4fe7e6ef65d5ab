// An NVIDIA GPU through the driver's own library, which is found when the program runs.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "library.hpp"
#include "megalodon/engine.hpp"

namespace megalodon::detail {

// The driver's functions that this library calls. cuda.h names the version of each that its types belong to.
struct CudaDriver {
    explicit CudaDriver(const Library& library);

    decltype(&cuInit) init;
    decltype(&cuGetErrorName) get_error_name;
    decltype(&cuDeviceGetCount) device_get_count;
    decltype(&cuDeviceGet) device_get;
    decltype(&cuDeviceGetAttribute) device_get_attribute;
    decltype(&cuDevicePrimaryCtxRetain) primary_context_retain;
    decltype(&cuDevicePrimaryCtxRelease) primary_context_release;
    decltype(&cuCtxPushCurrent) push_current;
    decltype(&cuCtxPopCurrent) pop_current;
    decltype(&cuStreamCreate) stream_create;
    decltype(&cuStreamDestroy) stream_destroy;
    decltype(&cuStreamSynchronize) stream_synchronize;
    decltype(&cuMemAlloc) allocate;
    decltype(&cuMemFree) free;
    decltype(&cuMemsetD8Async) fill;
    decltype(&cuMemcpyHtoDAsync) copy_to_device;
    decltype(&cuMemcpyDtoHAsync) copy_to_host;
    decltype(&cuMemcpyDtoDAsync) copy_in_device;
    decltype(&cuMemcpy2DAsync) copy_rows;
    decltype(&cuStreamBeginCapture) begin_capture;
    decltype(&cuStreamEndCapture) end_capture;
    decltype(&cuGraphInstantiateWithFlags) graph_instantiate;
    decltype(&cuGraphDestroy) graph_destroy;
    decltype(&cuGraphLaunch) graph_launch;
    decltype(&cuGraphExecDestroy) graph_exec_destroy;
};

// Its primary context, which libraries on top of the CUDA runtime use too, and a stream. Any thread may use it.
class Gpu {
 public:
    // Throws Error: missing_library without a driver, engine without such a GPU.
    explicit Gpu(int index);
    ~Gpu();
    Gpu(const Gpu&) = delete;
    Gpu& operator=(const Gpu&) = delete;

    // The context is this thread's current one while the object lives.
    class Current {
     public:
        explicit Current(const Gpu& gpu);
        ~Current();
        Current(const Current&) = delete;
        Current& operator=(const Current&) = delete;

     private:
        const Gpu& gpu_;
    };

    const CudaDriver& driver() const { return driver_; }
    CUcontext context() const { return context_; }
    CUstream stream() const { return stream_; }
    int capability() const { return capability_; }        // 89 for 8.9
    void check(CUresult result, const char* what) const;  // throws Error (engine)

 private:
    Library library_;
    CudaDriver driver_;
    CUdevice device_ = 0;
    CUcontext context_ = nullptr;
    CUstream stream_ = nullptr;
    int capability_ = 0;
};

// Memory of a GPU that goes with the object.
class GpuMemory {
 public:
    GpuMemory(const Gpu& gpu, std::size_t bytes);  // not cleared; throws Error (engine)
    ~GpuMemory();
    GpuMemory(const GpuMemory&) = delete;
    GpuMemory& operator=(const GpuMemory&) = delete;
    void* data() const { return data_; }

 private:
    const Gpu& gpu_;
    void* data_ = nullptr;
};

// Work that is carried out again and again with the same addresses: plainly the first time, because TensorRT wants a
// call to have run before it is captured; then captured as a CUDA graph, which is launched from then on. Where it
// cannot be captured, it runs plainly for ever. Used while the GPU is current.
class RepeatedWork {
 public:
    RepeatedWork(const Gpu& gpu, std::function<void()> enqueue) : gpu_(gpu), enqueue_(std::move(enqueue)) {}
    ~RepeatedWork();
    RepeatedWork(const RepeatedWork&) = delete;
    RepeatedWork& operator=(const RepeatedWork&) = delete;

    void run();  // throws what `enqueue` throws, and Error (engine)

 private:
    void capture();

    const Gpu& gpu_;
    std::function<void()> enqueue_;
    CUgraphExec graph_ = nullptr;
    int num_runs_ = 0;
    bool is_refused_ = false;
};

// Memory of a GPU, for an engine that computes there, on its stream.
class GpuEngine : public Engine {
 public:
    explicit GpuEngine(int device) : gpu_(std::make_unique<Gpu>(device)) {}

    bool has_fixed_shapes() const override { return true; }
    void* allocate(std::size_t bytes) override;
    void release(void* memory) noexcept override;
    void upload(void* to, const void* from_host, std::size_t bytes) override;
    void download(void* to_host, const void* from, std::size_t bytes) override;
    void fill_zero(void* memory, std::size_t bytes) override;
    void copy(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
              std::size_t rows) override;

 protected:
    const Gpu& gpu() const { return *gpu_; }

 private:
    std::unique_ptr<Gpu> gpu_;
};

}  // namespace megalodon::detail
