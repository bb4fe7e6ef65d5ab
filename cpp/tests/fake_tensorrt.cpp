// TensorRT of the stand-in for a GPU machine (fake_device.hpp).
//
// Its objects answer through tables of virtual functions that are filled in by the place which TensorRT's own headers
// give each function: so the same source stands for every version.
#include <NvInferRuntime.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "fake_device.hpp"
#include "fake_engine.hpp"
#include "tiny_bundle.hpp"

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

// An input that a call finds these bytes in, or fails.
struct Weight {
    trt::DataType type;
    std::string bytes;
};

struct EngineImpl : Object {
    EngineImpl(std::int64_t chunk_size, std::map<std::string, Weight> inputs)
        : manifest(tiny_bundle({11, chunk_size}).manifest()),
          model(FakeOptions{chunk_size, 64, true, false}),
          weights(std::move(inputs)) {
        names = {"tokens", "position", "logits"};
        for (const StateSpec& spec : manifest.state)
            names.insert(names.end(), {spec.past, spec.present});
        for (const auto& [name, weight] : weights)
            names.push_back(name);
    }
    Manifest manifest;
    mutable FakeEngine model;
    std::map<std::string, Weight> weights;
    std::vector<std::string> names;
    std::int64_t streaming_budget = -1;
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
        std::map<std::string, void*> addresses;
        for (const auto& [name, weight] : engine->weights)
            addresses[name] = self->addresses.at(name);
        const auto work = [engine, addresses, inputs = std::move(inputs), outputs = std::move(outputs)]() mutable {
            for (const auto& [name, weight] : engine->weights) {
                const std::size_t bytes = weight.bytes.size();
                require(weight.bytes.compare(0, bytes, host(addresses[name], bytes), bytes) == 0, "another " + name);
            }
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
    if (strategy != trt::ExecutionContextAllocationStrategy::kUSER_MANAGED || !has_context()) return nullptr;
    auto* impl = new ContextImpl;
    impl->table = context_table().address();
    impl->engine = self;
    ++fake_gpu_control.num_live;
    fake_gpu_control.streaming_budget = self->streaming_budget;
    return new FakeContext(impl);
}
std::int32_t num_tensors(EngineImpl* self) {
    return static_cast<std::int32_t>(self->names.size());
}
const char* name_of_tensor(EngineImpl* self, std::int32_t index) {
    return self->names.at(static_cast<std::size_t>(index)).c_str();
}
// Of weights, which alone the runtime asks for: two axes, the first of which has one element.
trt::Dims shape_of_tensor(EngineImpl* self, const char* name) {
    const Weight& weight = self->weights.at(name);
    const auto bytes = static_cast<std::int64_t>(weight.bytes.size());
    trt::Dims dims{};
    dims.nbDims = 2;
    dims.d[0] = 1;
    dims.d[1] = weight.type == trt::DataType::kINT4 ? 2 * bytes - 1 : bytes / 2;
    return dims;
}
trt::DataType type_of_tensor(EngineImpl* self, const char* name) {
    return self->weights.at(name).type;
}
std::int64_t scratch_bytes(EngineImpl*) {
    return kScratchBytes;
}
std::int64_t automatic_budget(EngineImpl*) {
    return kStreamingBudget;
}
bool set_budget(EngineImpl* self, std::int64_t bytes) {
    self->streaming_budget = bytes;
    return true;
}

const Table& engine_table() {
    using V = trt::apiv::VCudaEngine;
    static const Table table = Table()
                                   .with(&V::createExecutionContext, &create_context)
                                   .with(&V::getNbIOTensors, &num_tensors)
                                   .with(&V::getIOTensorName, &name_of_tensor)
                                   .with(&V::getTensorShape, &shape_of_tensor)
                                   .with(&V::getTensorDataType, &type_of_tensor)
                                   .with(&V::getDeviceMemorySizeV2, &scratch_bytes)
                                   .with(&V::getWeightStreamingAutomaticBudget, &automatic_budget)
                                   .with(&V::setWeightStreamingBudgetV2, &set_budget);
    return table;
}

FakeContext::~FakeContext() noexcept {
    delete reinterpret_cast<ContextImpl*>(mImpl);
    --fake_gpu_control.num_live;
}
FakeCudaEngine::~FakeCudaEngine() noexcept {
    delete reinterpret_cast<EngineImpl*>(mImpl);
}

trt::ILogger* logger = nullptr;  // that was given last

// A serialised engine of the stand-in is the length of its chunks, then name, type (half or int4) and bytes of each
// weight that it lacks.
trt::ICudaEngine* deserialize(Object*, const void* data, std::size_t bytes) {
    std::istringstream text({static_cast<const char*>(data), bytes});
    std::int64_t chunk_size = 0;
    if (!(text >> chunk_size)) {
        logger->log(trt::ILogger::Severity::kERROR, "no engine\nof the stand-in");
        return nullptr;
    }
    std::map<std::string, Weight> weights;
    for (std::string name, type, content; text >> name >> type >> content;)
        weights[name] = {type == "half" ? trt::DataType::kHALF : trt::DataType::kINT4, content};
    auto* impl = new EngineImpl(chunk_size, weights);
    impl->table = engine_table().address();
    return new FakeCudaEngine(impl);
}

void* load_library(Object* self, const char*) {
    return self;
}
void allow_host_code(Object*, bool is_allowed) {
    fake_gpu_control.is_host_code_allowed = is_allowed;
}
trt::IPluginRegistry& registry(Object*) {
    using Load = trt::IPluginRegistry::PluginLibraryHandle (trt::IPluginRegistry::*)(const char*) noexcept;
    static const Table table = Table().with(static_cast<Load>(&trt::IPluginRegistry::loadLibrary), &load_library);
    static Object object{table.address()};
    return *as<trt::IPluginRegistry>(&object);
}

}  // namespace
}  // namespace megalodon::test

using namespace megalodon::test;

FAKE_EXPORT std::int32_t getInferLibVersion() {
    return fake_gpu_control.tensorrt_version;
}
FAKE_EXPORT void* createInferRuntime_INTERNAL(void* given, std::int32_t version) {
    using V = trt::apiv::VRuntime;
    using Deserialize = trt::ICudaEngine* (V::*)(const void*, std::size_t) noexcept;
    static const Table table = Table()
                                   .with(static_cast<Deserialize>(&V::deserializeCudaEngine), &deserialize)
                                   .with(&V::getPluginRegistry, &registry)
                                   .with(&V::setEngineHostCodeAllowed, &allow_host_code);
    static Object object{table.address()};
    logger = static_cast<trt::ILogger*>(given);
    logger->log(trt::ILogger::Severity::kWARNING, "a warning of the stand-in");
    if (version != fake_gpu_control.tensorrt_version) return nullptr;
    return static_cast<trt::IRuntime*>(new FakeRuntime(&object));
}
