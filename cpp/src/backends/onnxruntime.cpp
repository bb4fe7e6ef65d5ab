// ONNX Runtime on the CPU. State is bound where it lies; nothing is copied for a call.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "backends.hpp"
#include "formats.hpp"
#include "library.hpp"
#include "logging.hpp"
#include "megalodon/onnxruntime_api.h"

namespace megalodon::detail {

namespace {

// ONNX Runtime's official builds otherwise send reports of their use to Microsoft, and keep an identifier and a
// database for that in the home directory. Who wants them sets the variable to 0. Said when this library is loaded:
// later, other threads may be reading the environment.
[[maybe_unused]] const int telemetry_is_off = ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);

constexpr char kVariable[] = "ONNXRUNTIME_LIBRARY";
constexpr char kInstall[] =
    "install ONNX Runtime (pip install onnxruntime, or your system's package) and set ONNXRUNTIME_LIBRARY to "
    "the path of libonnxruntime.so or to its directory";

int element_type(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return ort::kFloat;
        case DType::float16:
            return ort::kFloat16;
        case DType::bfloat16:
            return ort::kBFloat16;
        case DType::float8_e4m3:
            return ort::kFloat8E4M3;
        case DType::int8:
            return ort::kInt8;
        case DType::int64:
            return ort::kInt64;
        case DType::uint8:
        case DType::uint64:
            break;
    }
    throw Error(ErrorKind::internal, "Bug: no tensor of a graph is unsigned");
}

std::string one_line(std::string text) {
    std::replace(text.begin(), text.end(), '\n', ' ');
    return text;
}

// A value of ONNX Runtime's that is released with this.
template <typename T, typename Release>
class Owned {
 public:
    explicit Owned(const ort::Api& api) : api_(api) {}
    ~Owned() {
        if (value_ != nullptr) api_.call<Release>(value_);
    }
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    T** out() { return &value_; }
    T* get() const { return value_; }

 private:
    ort::Api api_;
    T* value_ = nullptr;
};

class OnnxRuntimeEngine : public Engine {
 public:
    OnnxRuntimeEngine(const Bundle& bundle, const SessionOptions& options)
        : library_(Library::open(options.library, kVariable, {"libonnxruntime.so.1", "libonnxruntime.so"}, kInstall)),
          api_(open_api(library_)),
          env_(api_),
          memory_(api_),
          session_(api_) {
        refuse_bfloat16(bundle);
        const std::string where = bundle.cpu_model_path().string();
        Owned<ort::SessionOptions, ort::ReleaseSessionOptions> session_options(api_);
        check(api_.call<ort::CreateEnv>(ort::kLogErrors, "megalodon", env_.out()), where);
        check(api_.call<ort::CreateCpuMemoryInfo>(ort::kArenaAllocator, ort::kDefaultMemory, memory_.out()), where);
        check(api_.call<ort::CreateSessionOptions>(session_options.out()), where);
        check(api_.call<ort::SetLogSeverity>(session_options.get(), ort::kLogErrors), where);
        check(api_.call<ort::SetIntraOpNumThreads>(session_options.get(), options.threads), where);
        register_operators(bundle, options, session_options.get());
        check(api_.call<ort::CreateSession>(static_cast<const ort::Env*>(env_.get()), where.c_str(),
                                            static_cast<const ort::SessionOptions*>(session_options.get()),
                                            session_.out()),
              where, ErrorKind::bundle, "; export it again");
        check_inputs(bundle, input_names(), where);
    }

    const char* backend() const override { return "onnxruntime"; }

    void run(const std::vector<TensorRef>& inputs, const std::vector<TensorRef>& outputs) override {
        const Values given(*this, inputs), wanted(*this, outputs);
        std::vector<ort::Value*> results = wanted.values;
        const ort::RunOptions* no_options = nullptr;
        check(api_.call<ort::Run>(session_.get(), no_options, given.names.data(), given.values.data(),
                                  given.values.size(), wanted.names.data(), results.size(), results.data()),
              "a call of the model");
    }

 private:
    // Tensors of one call, bound to the memory that they lie in.
    struct Values {
        Values(const OnnxRuntimeEngine& engine, const std::vector<TensorRef>& tensors) : api(engine.api_) {
            for (const TensorRef& tensor : tensors) {
                names.push_back(tensor.name.c_str());
                values.push_back(nullptr);
                const std::size_t bytes =
                    static_cast<std::size_t>(num_elements(tensor.shape)) * byte_size(tensor.dtype);
                engine.check(api.call<ort::CreateTensorWithData>(
                                 static_cast<const ort::MemoryInfo*>(engine.memory_.get()), tensor.data, bytes,
                                 tensor.shape.data(), tensor.shape.size(), element_type(tensor.dtype), &values.back()),
                             tensor.name);
            }
        }
        ~Values() {
            for (ort::Value* value : values) {
                if (value != nullptr) api.call<ort::ReleaseValue>(value);
            }
        }
        Values(const Values&) = delete;
        Values& operator=(const Values&) = delete;

        ort::Api api;
        std::vector<const char*> names;
        std::vector<ort::Value*> values;
    };

    static ort::Api open_api(const Library& library) {
        const auto* base = library.get<const ort::ApiBase* (*)()>("OrtGetApiBase")();
        const void* table = base->get_api(ort::kFirstVersion);
        if (table == nullptr) {
            throw Error(ErrorKind::missing_library, library.path() + ": ONNX Runtime " + base->get_version_string() +
                                                        " no longer has version 1 of its interface; " + kInstall);
        }
        return ort::Api(table);
    }

    static void refuse_bfloat16(const Bundle& bundle) {
        if (bundle.manifest().precision != "bf16") return;
        throw Error(ErrorKind::engine, bundle.path().string() +
                                           ": ONNX Runtime cannot multiply bf16 matrices on a CPU; use a TensorRT "
                                           "engine, or export with --precision fp32");
    }

    // ComplexEMA and TimestepNorm compiled, where their library was named; else the graph has them in standard
    // operators.
    void register_operators(const Bundle& bundle, const SessionOptions& options, ort::SessionOptions* target) const {
        const char* value = std::getenv(kOperatorsVariable);
        const std::string path = options.operators_library.empty() && value ? value : options.operators_library;
        if (path.empty() || bundle.manifest().precision != "fp32") return;  // they are float32
        void* handle = nullptr;
        check(api_.call<ort::RegisterCustomOpsLibrary>(target, path.c_str(), &handle), path, ErrorKind::missing_library,
              "; build it again with build-cpu");
        log(LogLevel::info, "loaded " + path);
    }

    // Throws Error with a status's message, and releases the status.
    void check(ort::Status* status, const std::string& where, ErrorKind kind = ErrorKind::engine,
               const char* what_to_do = "") const {
        if (status == nullptr) return;
        const std::string text = one_line(api_.call<ort::GetErrorMessage>(static_cast<const ort::Status*>(status)));
        api_.call<ort::ReleaseStatus>(status);
        throw Error(kind, where + ": ONNX Runtime says: " + text + what_to_do);
    }

    std::vector<std::string> input_names() const {
        const auto* session = static_cast<const ort::Session*>(session_.get());
        ort::Allocator* allocator = nullptr;
        check(api_.call<ort::GetDefaultAllocator>(&allocator), "its memory");
        std::size_t count = 0;
        check(api_.call<ort::SessionGetInputCount>(session, &count), "its inputs");
        std::vector<std::string> names;
        for (std::size_t index = 0; index < count; ++index) {
            char* name = nullptr;
            check(api_.call<ort::SessionGetInputName>(session, index, allocator, &name), "its inputs");
            names.emplace_back(name);
            check(api_.call<ort::AllocatorFree>(allocator, static_cast<void*>(name)), "its inputs");
        }
        return names;
    }

    Library library_;
    ort::Api api_;
    Owned<ort::Env, ort::ReleaseEnv> env_;
    Owned<ort::MemoryInfo, ort::ReleaseMemoryInfo> memory_;
    Owned<ort::Session, ort::ReleaseSession> session_;
};

}  // namespace

std::unique_ptr<Engine> open_onnxruntime(const Bundle& bundle, const SessionOptions& options) {
    return std::make_unique<OnnxRuntimeEngine>(bundle, options);
}

}  // namespace megalodon::detail
