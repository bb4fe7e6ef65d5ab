#include "gpu.hpp"

#include <algorithm>

#include "megalodon/error.hpp"

namespace megalodon::detail {

namespace {

constexpr char kDriverVariable[] = "MEGALODON_CUDA_DRIVER";
constexpr char kInstallDriver[] =
    "run it on a machine with an NVIDIA GPU and its driver, or use the backend onnxruntime";

CUdeviceptr address(const void* memory) {
    return reinterpret_cast<CUdeviceptr>(memory);
}

}  // namespace

// The name that cuda.h gives the function, version and all.
#define MEGALODON_NAME(function) #function
#define MEGALODON_GET(function) library.get<decltype(&function)>(MEGALODON_NAME(function))

CudaDriver::CudaDriver(const Library& library)
    : init(MEGALODON_GET(cuInit)),
      get_error_name(MEGALODON_GET(cuGetErrorName)),
      device_get_count(MEGALODON_GET(cuDeviceGetCount)),
      device_get(MEGALODON_GET(cuDeviceGet)),
      device_get_attribute(MEGALODON_GET(cuDeviceGetAttribute)),
      primary_context_retain(MEGALODON_GET(cuDevicePrimaryCtxRetain)),
      primary_context_release(MEGALODON_GET(cuDevicePrimaryCtxRelease)),
      push_current(MEGALODON_GET(cuCtxPushCurrent)),
      pop_current(MEGALODON_GET(cuCtxPopCurrent)),
      stream_create(MEGALODON_GET(cuStreamCreate)),
      stream_destroy(MEGALODON_GET(cuStreamDestroy)),
      stream_synchronize(MEGALODON_GET(cuStreamSynchronize)),
      allocate(MEGALODON_GET(cuMemAlloc)),
      free(MEGALODON_GET(cuMemFree)),
      fill(MEGALODON_GET(cuMemsetD8Async)),
      copy_to_device(MEGALODON_GET(cuMemcpyHtoDAsync)),
      copy_to_host(MEGALODON_GET(cuMemcpyDtoHAsync)),
      copy_in_device(MEGALODON_GET(cuMemcpyDtoDAsync)),
      copy_rows(MEGALODON_GET(cuMemcpy2DAsync)),
      begin_capture(MEGALODON_GET(cuStreamBeginCapture)),
      end_capture(MEGALODON_GET(cuStreamEndCapture)),
      graph_instantiate(MEGALODON_GET(cuGraphInstantiateWithFlags)),
      graph_destroy(MEGALODON_GET(cuGraphDestroy)),
      graph_launch(MEGALODON_GET(cuGraphLaunch)),
      graph_exec_destroy(MEGALODON_GET(cuGraphExecDestroy)) {}

#undef MEGALODON_GET
#undef MEGALODON_NAME

Gpu::Gpu(int index)
    : library_(Library::open("", kDriverVariable, {"libcuda.so.1"}, kInstallDriver)), driver_(library_) {
    int count = 0;
    if (const CUresult result = driver_.init(0); result != CUDA_SUCCESS) {
        const char* name = nullptr;
        driver_.get_error_name(result, &name);
        throw Error(ErrorKind::missing_library, std::string("no NVIDIA GPU can be used here (") +
                                                    (name == nullptr ? "unknown error" : name) + "); " +
                                                    kInstallDriver);
    }
    check(driver_.device_get_count(&count), "counting the GPUs");
    if (index < 0 || index >= count) {
        throw Error(ErrorKind::engine, "device = " + std::to_string(index) + ": this machine has " +
                                           std::to_string(count) + " GPUs, counted from 0");
    }
    check(driver_.device_get(&device_, index), "opening the GPU");
    int major = 0, minor = 0;
    check(driver_.device_get_attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device_),
          "asking the GPU");
    check(driver_.device_get_attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device_),
          "asking the GPU");
    capability_ = 10 * major + minor;
    check(driver_.primary_context_retain(&context_, device_), "opening the GPU's context");
    try {
        const Current current(*this);
        check(driver_.stream_create(&stream_, CU_STREAM_NON_BLOCKING), "creating a stream");
    } catch (...) {
        driver_.primary_context_release(device_);
        throw;
    }
}

Gpu::~Gpu() {
    if (driver_.push_current(context_) == CUDA_SUCCESS) {
        driver_.stream_destroy(stream_);
        CUcontext context;
        driver_.pop_current(&context);
    }
    driver_.primary_context_release(device_);
}

Gpu::Current::Current(const Gpu& gpu) : gpu_(gpu) {
    gpu.check(gpu.driver_.push_current(gpu.context_), "choosing the GPU");
}

Gpu::Current::~Current() {
    CUcontext context;
    gpu_.driver_.pop_current(&context);
}

void Gpu::check(CUresult result, const char* what) const {
    if (result == CUDA_SUCCESS) return;
    const char* name = nullptr;
    driver_.get_error_name(result, &name);
    throw Error(ErrorKind::engine, std::string("CUDA: ") + what + " failed (" + (name == nullptr ? "unknown" : name) +
                                       "); open the session again, with fewer slots if memory is short");
}

GpuMemory::GpuMemory(const Gpu& gpu, std::size_t bytes) : gpu_(gpu) {
    const Gpu::Current current(gpu);
    CUdeviceptr memory = 0;
    gpu.check(gpu.driver().allocate(&memory, bytes + 1), "allocating memory");  // of no bytes it allocates nothing
    data_ = reinterpret_cast<void*>(memory);
}

GpuMemory::~GpuMemory() {
    const CudaDriver& driver = gpu_.driver();
    if (driver.push_current(gpu_.context()) != CUDA_SUCCESS) return;  // the GPU is gone, its memory too
    driver.stream_synchronize(gpu_.stream());
    driver.free(address(data_));
    CUcontext context;
    driver.pop_current(&context);
}

RepeatedWork::~RepeatedWork() {
    if (graph_ != nullptr) gpu_.driver().graph_exec_destroy(graph_);
}

void RepeatedWork::run() {
    if (num_runs_ == 1 && !is_refused_) capture();
    num_runs_ = std::min(num_runs_ + 1, 2);
    if (graph_ == nullptr) return enqueue_();
    gpu_.check(gpu_.driver().graph_launch(graph_, gpu_.stream()), "launching a step");
}

void RepeatedWork::capture() {
    const CudaDriver& driver = gpu_.driver();
    is_refused_ = true;
    // Thread-local: other threads of the program may go on using CUDA.
    const CUresult begun = driver.begin_capture(gpu_.stream(), CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    if (begun != CUDA_SUCCESS) return;
    bool is_whole = true;
    try {
        enqueue_();
    } catch (const Error&) {  // the plain run says what is wrong, if something is wrong then too
        is_whole = false;
    }
    CUgraph graph = nullptr;  // whatever happened, the stream must not stay in capture
    if (driver.end_capture(gpu_.stream(), &graph) != CUDA_SUCCESS || graph == nullptr) return;
    if (is_whole && driver.graph_instantiate(&graph_, graph, 0) == CUDA_SUCCESS) is_refused_ = false;
    driver.graph_destroy(graph);
}

void* GpuEngine::allocate(std::size_t bytes) {
    const Gpu::Current current(gpu());
    CUdeviceptr memory = 0;
    gpu().check(gpu().driver().allocate(&memory, bytes + 1), "allocating memory");  // of no bytes it allocates nothing
    gpu().check(gpu().driver().fill(memory, 0, bytes + 1, gpu().stream()), "clearing memory");
    return reinterpret_cast<void*>(memory);
}

void GpuEngine::release(void* memory) noexcept {
    const CudaDriver& driver = gpu().driver();
    if (driver.push_current(gpu().context()) != CUDA_SUCCESS) return;  // the GPU is gone, its memory too
    driver.stream_synchronize(gpu().stream());
    driver.free(address(memory));
    CUcontext context;
    driver.pop_current(&context);
}

// Pageable memory is staged before the call returns, as the driver's manual promises: nobody waits.
void GpuEngine::upload(void* to, const void* from_host, std::size_t bytes) {
    const Gpu::Current current(gpu());
    gpu().check(gpu().driver().copy_to_device(address(to), from_host, bytes, gpu().stream()), "copying to the GPU");
}

void GpuEngine::download(void* to_host, const void* from, std::size_t bytes) {
    const Gpu::Current current(gpu());
    gpu().check(gpu().driver().copy_to_host(to_host, address(from), bytes, gpu().stream()), "copying from the GPU");
    gpu().check(gpu().driver().stream_synchronize(gpu().stream()), "a call of the model");
}

void GpuEngine::fill_zero(void* memory, std::size_t bytes) {
    if (bytes == 0) return;
    const Gpu::Current current(gpu());
    gpu().check(gpu().driver().fill(address(memory), 0, bytes, gpu().stream()), "clearing memory");
}

void GpuEngine::copy(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                     std::size_t rows) {
    if (width == 0 || rows == 0) return;
    const Gpu::Current current(gpu());
    if (rows == 1) {
        gpu().check(gpu().driver().copy_in_device(address(to), address(from), width, gpu().stream()), "copying state");
        return;
    }
    CUDA_MEMCPY2D request{};
    request.srcMemoryType = CU_MEMORYTYPE_DEVICE;
    request.srcDevice = address(from);
    request.srcPitch = from_pitch;
    request.dstMemoryType = CU_MEMORYTYPE_DEVICE;
    request.dstDevice = address(to);
    request.dstPitch = to_pitch;
    request.WidthInBytes = width;
    request.Height = rows;
    gpu().check(gpu().driver().copy_rows(&request, gpu().stream()), "copying state");
}

}  // namespace megalodon::detail
