// A machine with a GPU, without one: libcuda, TensorRT and libmegalodon in one library, each as far as the runtime
// calls it, over the model of fake_engine.cpp.
//
// Work is only noted down when it is enqueued and done when somebody waits for it, as late as a real GPU may do it.
// Device memory cannot be read by the program, begins as NaN, and every access is checked; a call without the GPU's
// context fails, as does one that breaks a capture. TensorRT's objects answer through tables of virtual functions that
// are filled in by the place which its own headers give each function: so the same source stands for every version.
#include "fake_gpu.hpp"

#include <NvInferRuntime.h>
#include <cuda.h>
#include <megalodon/megalodon.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "choice.hpp"
#include "fake_engine.hpp"
#include "tiny_bundle.hpp"

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

FAKE_EXPORT megalodon::test::FakeGpuControl fake_gpu_control;
megalodon::test::FakeGpuControl fake_gpu_control;

namespace megalodon::test {
namespace {

using Work = std::function<void()>;
using Address = unsigned long long;

constexpr Address kDeviceOffset = Address{1} << 56;
constexpr Address kAlignment = 256;

struct Block {
    std::vector<char> bytes;
    Address start;
};
std::map<Address, Block> blocks;  // by the first address
int context_depth = 0;            // of the one thread that the tests use it from

void require(bool is_true, const std::string& what) {
    if (!is_true) throw std::logic_error("stand-in: " + what);
}

// The memory behind a device address, of which `bytes` are used.
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

struct Stream {
    std::vector<Work> queue;
    std::optional<std::vector<Work>> capture;
    bool is_capture_broken = false;
    bool has_failed = false;
};
std::vector<Stream*> streams;

Stream& stream_of(void* handle) {
    const auto found = std::find(streams.begin(), streams.end(), static_cast<Stream*>(handle));
    require(found != streams.end(), "a stream that there is not");
    return **found;
}

CUresult guarded(const std::function<CUresult()>& body) {
    try {
        return context_depth > 0 ? body() : CUDA_ERROR_INVALID_CONTEXT;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return CUDA_ERROR_LAUNCH_FAILED;
    }
}

// Calls that wait or take memory break the captures of their thread.
CUresult not_while_capturing(const std::function<CUresult()>& body) {
    return guarded([&] {
        for (Stream* stream : streams) {
            if (!stream->capture) continue;
            stream->is_capture_broken = true;
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
        return body();
    });
}

CUresult enqueue(void* handle, Work work) {
    return guarded([&] {
        Stream& stream = stream_of(handle);
        (stream.capture ? *stream.capture : stream.queue).push_back(std::move(work));
        return CUDA_SUCCESS;
    });
}

CUresult copy_rows(void* stream, Address to, std::size_t to_pitch, Address from, std::size_t from_pitch,
                   std::size_t width, std::size_t rows) {
    return enqueue(stream, [=] {
        for (std::size_t row = 0; row < rows; ++row)
            std::memmove(host(to + row * to_pitch, width), host(from + row * from_pitch, width), width);
    });
}

}  // namespace
}  // namespace megalodon::test

using namespace megalodon::test;

// libcuda.

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
    streams.push_back(new Stream);
    *stream = reinterpret_cast<CUstream>(streams.back());
    ++fake_gpu_control.num_live;
    return CUDA_SUCCESS;
}
FAKE_EXPORT CUresult cuStreamDestroy(CUstream handle) {
    return guarded([&] {
        Stream& stream = stream_of(handle);
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
        Stream& stream = stream_of(handle);
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
        ++fake_gpu_control.num_live;
        return CUDA_SUCCESS;
    });
}
FAKE_EXPORT CUresult cuMemFree(CUdeviceptr memory) {
    return not_while_capturing([&] {
        for (const Stream* stream : streams)
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
        Stream& stream = stream_of(handle);
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

// libmegalodon, as its header describes it.

FAKE_EXPORT std::int32_t mgd_abi_version(void) {
    return MGD_ABI_VERSION;
}
FAKE_EXPORT const char* mgd_status_string(int) {
    return "a refusal of the stand-in";
}
FAKE_EXPORT int mgd_append_rows(const mgd_append* tensors, std::int64_t count, std::int64_t B, std::int64_t T,
                                std::int64_t S, std::int64_t C, const std::int64_t* position, void* stream) {
    const std::vector<mgd_append> table(tensors, tensors + count);
    const auto work = [=] {
        const auto* positions = reinterpret_cast<const std::int64_t*>(host(position, static_cast<std::size_t>(B) * 8));
        for (const mgd_append& append : table) {
            const auto bytes = static_cast<std::size_t>(append.row_bytes);
            const auto places = static_cast<std::size_t>(B * append.heads);
            const char* rows = host(append.rows, places * static_cast<std::size_t>(T) * bytes);
            char* memory = host(append.memory, places * static_cast<std::size_t>(S) * bytes);
            for (std::int64_t place = 0; place < B * append.heads; ++place) {
                const std::int64_t first = positions[place / append.heads] % C;
                for (std::int64_t token = 0; token < T && first + token < S; ++token) {
                    std::memcpy(memory + static_cast<std::size_t>(place * S + first + token) * bytes,
                                rows + static_cast<std::size_t>(place * T + token) * bytes, bytes);
                }
            }
        }
    };
    return enqueue(stream, work) == CUDA_SUCCESS ? MGD_OK : MGD_INTERNAL_ERROR;
}
FAKE_EXPORT std::size_t mgd_choose_tokens_workspace_bytes(std::int64_t B, std::int64_t V) {
    return static_cast<std::size_t>(8 * B * V);
}
FAKE_EXPORT int mgd_choose_tokens(std::int64_t B, std::int64_t V, const float* logits, const mgd_choice* choices,
                                  const std::int64_t* recent, std::int64_t max_recent, std::int64_t* tokens,
                                  void* workspace, std::size_t workspace_bytes, void* stream) {
    const auto rows = static_cast<std::size_t>(B), width = static_cast<std::size_t>(V);
    const auto most = static_cast<std::size_t>(max_recent);
    const auto work = [=] {
        require(workspace_bytes >= mgd_choose_tokens_workspace_bytes(B, V), "a workspace that is too small");
        host(workspace, workspace_bytes);
        const auto* all = reinterpret_cast<const float*>(host(logits, rows * width * sizeof(float)));
        const auto* settings = reinterpret_cast<const mgd_choice*>(host(choices, rows * sizeof(mgd_choice)));
        const auto* seen = reinterpret_cast<const std::int64_t*>(host(recent, rows * most * 8));
        auto* chosen = reinterpret_cast<std::int64_t*>(host(tokens, rows * 8));
        for (std::size_t row = 0; row < rows; ++row) {
            const mgd_choice& given = settings[row];
            if (given.is_wanted == 0) continue;
            megalodon::SamplingParams params{given.temperature,        {},  given.top_p, given.min_p,
                                             given.repetition_penalty, 256, {}};
            if (given.top_k > 0) params.top_k = static_cast<std::uint64_t>(given.top_k);
            const auto* first = seen + row * most;
            const megalodon::TokenChoice choice{true, params, given.uniform, {first, first + given.num_recent}};
            chosen[row] = megalodon::detail::choose({all + row * width, all + (row + 1) * width}, choice);
        }
    };
    return enqueue(stream, work) == CUDA_SUCCESS ? MGD_OK : MGD_INTERNAL_ERROR;
}

// TensorRT.

namespace megalodon::test {
namespace {

namespace trt = nvinfer1;

[[noreturn]] void unexpected() {
    std::fprintf(stderr, "stand-in: a function of TensorRT that the runtime is not known to call\n");
    std::abort();
}

// A table of virtual functions. A pointer to a virtual member function holds the function's place in it (Itanium C++
// ABI, section 2.3).
class Table {
 public:
    Table() { entries_.fill(reinterpret_cast<void*>(&unexpected)); }

    template <typename Member, typename Function>
    Table& with(Member member, Function function) {
        std::ptrdiff_t place = 0;
        std::memcpy(&place, &member, sizeof place);
        entries_.at(static_cast<std::size_t>(place) / sizeof(void*)) = reinterpret_cast<void*>(function);
        return *this;
    }
    const void* address() const { return entries_.data(); }

 private:
    std::array<void*, 160> entries_;
};

// An object whose class is such a table.
struct Object {
    const void* table;
};
template <typename Interface>
Interface* as(Object* object) {
    return reinterpret_cast<Interface*>(object);
}

struct ContextImpl;
struct EngineImpl;

struct FakeContext : trt::IExecutionContext {
    explicit FakeContext(Object* impl) { mImpl = as<trt::apiv::VExecutionContext>(impl); }
    ~FakeContext() noexcept override;
};
struct FakeCudaEngine : trt::ICudaEngine {
    explicit FakeCudaEngine(Object* impl) { mImpl = as<trt::apiv::VCudaEngine>(impl); }
    ~FakeCudaEngine() noexcept override;
};
struct FakeRuntime : trt::IRuntime {
    explicit FakeRuntime(Object* impl) { mImpl = as<trt::apiv::VRuntime>(impl); }
};

constexpr std::int64_t kScratchBytes = 12345;

struct ContextImpl : Object {
    const EngineImpl* engine;
    std::map<std::string, Shape> shapes;
    std::map<std::string, void*> addresses;
    std::optional<std::map<std::string, Shape>> ran_with;
    void* scratch = nullptr;
};

struct EngineImpl : Object {
    explicit EngineImpl(std::int64_t chunk_size)
        : manifest(tiny_bundle({11, chunk_size}).manifest()), model(FakeOptions{chunk_size, 64, true, false}) {
        names = {"tokens", "position", "logits"};
        for (const StateSpec& spec : manifest.state)
            names.insert(names.end(), {spec.past, spec.present});
    }
    Manifest manifest;
    mutable FakeEngine model;
    std::vector<std::string> names;
};

bool set_input_shape(ContextImpl* self, const char* name, const trt::Dims& dims) {
    self->shapes[name] = Shape(dims.d, dims.d + dims.nbDims);
    return true;
}
bool set_address(ContextImpl* self, const char* name, void* data) {
    self->addresses[name] = data;
    return reinterpret_cast<Address>(data) % kAlignment == 0;
}
void set_device_memory(ContextImpl* self, void* memory, std::int64_t bytes) {
    self->scratch = bytes == kScratchBytes ? memory : nullptr;
}

// The tensors of a call in the model's order, still by device address.
std::pair<std::vector<TensorRef>, std::vector<TensorRef>> tensors_of(const ContextImpl& self) {
    const Shape& tokens = self.shapes.at("tokens");
    std::vector<TensorRef> inputs = {
        {"tokens", DType::int64, tokens, self.addresses.at("tokens")},
        {"position", DType::int64, self.shapes.at("position"), self.addresses.at("position")}};
    std::vector<TensorRef> outputs = {
        {"logits", DType::float32, {tokens[0], 1, self.engine->manifest.vocab_size}, self.addresses.at("logits")}};
    for (const StateSpec& spec : self.engine->manifest.state) {
        inputs.push_back({spec.past, spec.dtype, self.shapes.at(spec.past), self.addresses.at(spec.past)});
        outputs.push_back({spec.present, spec.dtype, concrete_shape(spec.present_shape, tokens[0], tokens[1], 0),
                           self.addresses.at(spec.present)});
    }
    return {inputs, outputs};
}

void to_host(std::vector<TensorRef>& tensors) {
    for (TensorRef& tensor : tensors) {
        const std::size_t bytes = static_cast<std::size_t>(num_elements(tensor.shape)) * byte_size(tensor.dtype);
        tensor.data = host(tensor.data, bytes);
    }
}

bool enqueue_call(ContextImpl* self, CUstream stream) {
    ++fake_gpu_control.num_calls;
    if (fake_gpu_control.refuses_calls || self->scratch == nullptr) return false;
    try {
        if (stream_of(stream).capture && self->ran_with != self->shapes) {
            stream_of(stream).is_capture_broken = true;  // a first call with new shapes does what none may capture
            return false;
        }
        self->ran_with = self->shapes;
        const EngineImpl* engine = self->engine;
        auto [inputs, outputs] = tensors_of(*self);
        const auto work = [engine, inputs = std::move(inputs), outputs = std::move(outputs)]() mutable {
            std::vector<TensorRef> given = inputs, wanted = outputs;
            to_host(given);
            to_host(wanted);
            engine->model.run(given, wanted);
        };
        return enqueue(stream, work) == CUDA_SUCCESS;
    } catch (const std::exception& error) {  // a tensor that was not bound
        std::fprintf(stderr, "%s\n", error.what());
        return false;
    }
}

const Table& context_table() {
    using V = trt::apiv::VExecutionContext;
    static const Table table = Table()
                                   .with(&V::setInputShape, &set_input_shape)
                                   .with(&V::setTensorAddress, &set_address)
                                   .with(&V::setDeviceMemoryV2, &set_device_memory)
                                   .with(&V::enqueueV3, &enqueue_call);
    return table;
}

trt::IExecutionContext* create_context(EngineImpl* self, trt::ExecutionContextAllocationStrategy strategy) {
    if (strategy != trt::ExecutionContextAllocationStrategy::kUSER_MANAGED || context_depth == 0) return nullptr;
    auto* impl = new ContextImpl;
    impl->table = context_table().address();
    impl->engine = self;
    ++fake_gpu_control.num_live;
    return new FakeContext(impl);
}
std::int32_t num_tensors(EngineImpl* self) {
    return static_cast<std::int32_t>(self->names.size());
}
const char* name_of_tensor(EngineImpl* self, std::int32_t index) {
    return self->names.at(static_cast<std::size_t>(index)).c_str();
}
std::int64_t scratch_bytes(EngineImpl*) {
    return kScratchBytes;
}

const Table& engine_table() {
    using V = trt::apiv::VCudaEngine;
    static const Table table = Table()
                                   .with(&V::createExecutionContext, &create_context)
                                   .with(&V::getNbIOTensors, &num_tensors)
                                   .with(&V::getIOTensorName, &name_of_tensor)
                                   .with(&V::getDeviceMemorySizeV2, &scratch_bytes);
    return table;
}

FakeContext::~FakeContext() noexcept {
    delete reinterpret_cast<ContextImpl*>(mImpl);
    --fake_gpu_control.num_live;
}
FakeCudaEngine::~FakeCudaEngine() noexcept {
    delete reinterpret_cast<EngineImpl*>(mImpl);
}

// A serialised engine of the stand-in is the length of its chunks.
trt::ICudaEngine* deserialize(Object*, const void* data, std::size_t bytes) {
    const std::string text(static_cast<const char*>(data), bytes);
    if (text.find_first_not_of("0123456789") != std::string::npos) return nullptr;
    auto* impl = new EngineImpl(std::stoll(text));
    impl->table = engine_table().address();
    return new FakeCudaEngine(impl);
}

void* load_library(Object* self, const char*) {
    return self;
}
trt::IPluginRegistry& registry(Object*) {
    using Load = trt::IPluginRegistry::PluginLibraryHandle (trt::IPluginRegistry::*)(const char*) noexcept;
    static const Table table = Table().with(static_cast<Load>(&trt::IPluginRegistry::loadLibrary), &load_library);
    static Object object{table.address()};
    return *as<trt::IPluginRegistry>(&object);
}

}  // namespace
}  // namespace megalodon::test

FAKE_EXPORT std::int32_t getInferLibVersion() {
    return fake_gpu_control.tensorrt_version;
}
FAKE_EXPORT void* createInferRuntime_INTERNAL(void* logger, std::int32_t version) {
    using V = trt::apiv::VRuntime;
    using Deserialize = trt::ICudaEngine* (V::*)(const void*, std::size_t) noexcept;
    static const Table table = Table()
                                   .with(static_cast<Deserialize>(&V::deserializeCudaEngine), &deserialize)
                                   .with(&V::getPluginRegistry, &registry);
    static Object object{table.address()};
    static_cast<trt::ILogger*>(logger)->log(trt::ILogger::Severity::kWARNING, "a warning of the stand-in");
    if (version != fake_gpu_control.tensorrt_version) return nullptr;
    return static_cast<trt::IRuntime*>(new FakeRuntime(&object));
}
