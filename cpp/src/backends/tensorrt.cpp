// The calls into TensorRT, and nothing else. Compiled once for each ABI, with MEGALODON_TENSORRT_ABI 10 or 11 and with
// TensorRT's namespace renamed, so that the inline functions of its two sets of headers do not collide.
#include "tensorrt.hpp"

#include <NvInferRuntime.h>

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

class Execution : public TensorRT {
 public:
    explicit Execution(const TensorRTRequest& request) {
        // The library is given its own version: the ABI is what was chosen by it, its other numbers do not matter.
        const auto version = request.library.get<int32_t (*)()>("getInferLibVersion")();
        const auto create = request.library.get<void* (*)(void*, int32_t)>("createInferRuntime_INTERNAL");
        runtime_.reset(static_cast<trt::IRuntime*>(create(static_cast<trt::ILogger*>(&messages_), version)));
        if (!runtime_) fail(request.where + ": TensorRT cannot start");
        if (!request.plugin_library.empty() &&
            runtime_->getPluginRegistry().loadLibrary(request.plugin_library.c_str()) == nullptr) {
            fail(request.plugin_library + ": TensorRT cannot load these plugins");
        }
        engine_.reset(runtime_->deserializeCudaEngine(request.engine, request.engine_bytes));
        if (!engine_) fail(request.where + ": TensorRT cannot load it");
        context_.reset(engine_->createExecutionContext());
        if (!context_) fail(request.where + ": TensorRT cannot make an execution context");
    }

    std::vector<std::string> tensor_names() const override {
        std::vector<std::string> names;
        for (int32_t index = 0; index < engine_->getNbIOTensors(); ++index) {
            names.emplace_back(engine_->getIOTensorName(index));
        }
        return names;
    }

    void enqueue(const std::vector<TensorRef>& inputs, const std::vector<TensorRef>& outputs,
                 CUstream_st* stream) override {
        for (const TensorRef& input : inputs) {
            if (!context_->setInputShape(input.name.c_str(), dims_of(input.shape))) {
                fail("engine: the shape of " + input.name + " is outside its profile");
            }
            bind(input);
        }
        for (const TensorRef& output : outputs)
            bind(output);
        if (!context_->enqueueV3(stream)) fail("engine: TensorRT refused the call");
    }

 private:
    void bind(const TensorRef& tensor) {
        if (!context_->setTensorAddress(tensor.name.c_str(), tensor.data)) {
            fail("engine: " + tensor.name + " cannot be bound");
        }
    }

    [[noreturn]] void fail(const std::string& what) {
        throw Error(ErrorKind::engine,
                    what + " (" + messages_.take() + "); build it again with `megalodon-deploy build`");
    }

    Messages messages_;  // first: the others keep a pointer to it
    std::unique_ptr<trt::IRuntime> runtime_;
    std::unique_ptr<trt::ICudaEngine> engine_;
    std::unique_ptr<trt::IExecutionContext> context_;
};

}  // namespace MEGALODON_ABI_NAMESPACE

std::unique_ptr<TensorRT> MEGALODON_OPEN(const TensorRTRequest& request) {
    return std::make_unique<MEGALODON_ABI_NAMESPACE::Execution>(request);
}

}  // namespace megalodon::detail
