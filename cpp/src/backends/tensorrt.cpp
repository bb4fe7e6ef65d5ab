// The calls into TensorRT, and nothing else. Compiled once for each ABI, with MEGALODON_TENSORRT_ABI 10 or 11 and with
// TensorRT's namespace renamed, so that the inline functions of its two sets of headers do not collide.
#include "tensorrt.hpp"

#include <NvInferRuntime.h>

#include <algorithm>
#include <mutex>

#include "logging.hpp"

#if MEGALODON_TENSORRT_ABI == 10
#define MEGALODON_ABI_NAMESPACE tensorrt_abi10
#define MEGALODON_OPEN open_tensorrt_abi10
#else
#define MEGALODON_ABI_NAMESPACE tensorrt_abi11
#define MEGALODON_OPEN open_tensorrt_abi11
#endif

namespace megalodon::detail {

namespace MEGALODON_ABI_NAMESPACE {

namespace trt = nvinfer1;

// TensorRT's messages: to the log, and the last error for ours. Any thread of TensorRT's may call it.
class Messages : public trt::ILogger {
 public:
    void log(Severity severity, const char* text) noexcept override {
        try {
            const bool is_error = severity <= Severity::kERROR;
            if (is_error) {
                const std::lock_guard<std::mutex> lock(mutex_);
                last_error_ = text;
                std::replace(last_error_.begin(), last_error_.end(), '\n', ' ');
            }
            const LogLevel level = is_error                         ? LogLevel::error
                                   : severity == Severity::kWARNING ? LogLevel::warning
                                   : severity == Severity::kINFO    ? LogLevel::info
                                                                    : LogLevel::debug;
            detail::log(level, std::string("TensorRT: ") + text);
        } catch (...) {  // no memory for a message: it is dropped
        }
    }
    std::string take() {
        const std::lock_guard<std::mutex> lock(mutex_);
        std::string text = last_error_.empty() ? "it gave no reason" : std::move(last_error_);
        last_error_.clear();
        return text;
    }

 private:
    std::mutex mutex_;
    std::string last_error_;
};

trt::Dims dims_of(const Shape& shape) {
    trt::Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    for (std::size_t axis = 0; axis < shape.size(); ++axis)
        dims.d[axis] = shape[axis];
    return dims;
}

int bits(trt::DataType type) {
    constexpr auto kFp4 = static_cast<trt::DataType>(10);  // its name came with TensorRT 10.8
    using T = trt::DataType;
    if (type == T::kINT64) return 64;
    if (type == T::kFLOAT || type == T::kINT32) return 32;
    if (type == T::kHALF || type == T::kBF16) return 16;
    return type == T::kINT4 || type == kFp4 ? 4 : 8;
}

[[noreturn]] void fail(Messages& messages, const std::string& what) {
    throw Error(ErrorKind::engine, what + " (" + messages.take() + "); build it again with `megalodon-deploy build`");
}

class Context : public TensorRTContext {
 public:
    Context(std::unique_ptr<trt::IExecutionContext> context, Messages& messages)
        : context_(std::move(context)), messages_(messages) {}

    void bind(const std::vector<TensorRef>& inputs, const std::vector<TensorRef>& outputs) override {
        for (const TensorRef& input : inputs) {
            if (!context_->setInputShape(input.name.c_str(), dims_of(input.shape))) {
                fail(messages_, "engine: the shape of " + input.name + " is outside its profile");
            }
            bind_address(input.name, input.data);
        }
        for (const TensorRef& output : outputs)
            bind_address(output.name, output.data);
    }

    void bind_weight(const std::string& name, void* data) override { bind_address(name, data); }

    void enqueue(CUstream_st* stream) override {
        if (!context_->enqueueV3(stream)) fail(messages_, "engine: TensorRT refused the call");
    }

 private:
    void bind_address(const std::string& name, void* data) {
        if (!context_->setTensorAddress(name.c_str(), data)) fail(messages_, "engine: " + name + " cannot be bound");
    }

    std::unique_ptr<trt::IExecutionContext> context_;
    Messages& messages_;
};

class Execution : public TensorRT {
 public:
    explicit Execution(const TensorRTRequest& request) {
        // The library is given its own version: the ABI is what was chosen by it, its other numbers do not matter.
        const auto version = request.library.get<int32_t (*)()>("getInferLibVersion")();
        const auto create = request.library.get<void* (*)(void*, int32_t)>("createInferRuntime_INTERNAL");
        runtime_.reset(static_cast<trt::IRuntime*>(create(static_cast<trt::ILogger*>(&messages_), version)));
        if (!runtime_) fail(messages_, request.where + ": TensorRT cannot start");
        if (!request.plugin_library.empty() &&
            runtime_->getPluginRegistry().loadLibrary(request.plugin_library.c_str()) == nullptr) {
            fail(messages_, request.plugin_library + ": TensorRT cannot load these plugins");
        }
        if (request.is_for_later_releases) runtime_->setEngineHostCodeAllowed(true);
        engine_.reset(runtime_->deserializeCudaEngine(request.engine, request.engine_bytes));
        if (!engine_) fail(messages_, request.where + ": TensorRT cannot load it");
        // Before the first context: what of the weights stays on the GPU, as far as there is room now.
        if (request.has_streamed_weights &&
            !engine_->setWeightStreamingBudgetV2(engine_->getWeightStreamingAutomaticBudget())) {
            fail(messages_, request.where + ": TensorRT cannot stream its weights");
        }
    }

    std::vector<std::string> tensor_names() const override {
        std::vector<std::string> names;
        for (int32_t index = 0; index < engine_->getNbIOTensors(); ++index) {
            names.emplace_back(engine_->getIOTensorName(index));
        }
        return names;
    }

    std::uint64_t tensor_bytes(const std::string& name) const override {
        const trt::Dims dims = engine_->getTensorShape(name.c_str());
        std::int64_t count = 1;
        for (int32_t axis = 0; axis < dims.nbDims; ++axis)
            count *= dims.d[axis];
        return static_cast<std::uint64_t>((count * bits(engine_->getTensorDataType(name.c_str())) + 7) / 8);
    }

    std::size_t scratch_bytes() const override { return static_cast<std::size_t>(engine_->getDeviceMemorySizeV2()); }

    std::unique_ptr<TensorRTContext> open_context(void* scratch, bool has_fixed_shapes) override {
        std::unique_ptr<trt::IExecutionContext> context(create_context(has_fixed_shapes));
        if (!context) fail(messages_, "engine: TensorRT cannot make an execution context");
        context->setDeviceMemoryV2(scratch, engine_->getDeviceMemorySizeV2());
        return std::make_unique<Context>(std::move(context), messages_);
    }

 private:
    trt::IExecutionContext* create_context([[maybe_unused]] bool has_fixed_shapes) {
        constexpr auto kOurs = trt::ExecutionContextAllocationStrategy::kUSER_MANAGED;
#ifdef TRT_MAJOR_RTX
        // TensorRT-RTX compiles kernels for the shapes of a call: by default while general ones already run, which a
        // captured graph would keep for ever.
        using Specialisation = trt::DynamicShapesKernelSpecializationStrategy;
        const std::unique_ptr<trt::IRuntimeConfig> config(engine_->createRuntimeConfig());
        if (!config) return nullptr;
        config->setExecutionContextAllocationStrategy(kOurs);
        config->setDynamicShapesKernelSpecializationStrategy(has_fixed_shapes ? Specialisation::kEAGER
                                                                              : Specialisation::kLAZY);
        return engine_->createExecutionContext(config.get());
#else
        return engine_->createExecutionContext(kOurs);
#endif
    }

    Messages messages_;  // first: the others keep a pointer to it
    std::unique_ptr<trt::IRuntime> runtime_;
    std::unique_ptr<trt::ICudaEngine> engine_;
};

}  // namespace MEGALODON_ABI_NAMESPACE

std::unique_ptr<TensorRT> MEGALODON_OPEN(const TensorRTRequest& request) {
    return std::make_unique<MEGALODON_ABI_NAMESPACE::Execution>(request);
}

}  // namespace megalodon::detail
