// Which engine, which library, which ABI: everything about TensorRT but the calls into it.
#include <cstdlib>

#include "backends.hpp"
#include "engine_info.hpp"
#include "files.hpp"
#include "formats.hpp"
#include "gpu.hpp"
#include "megalodon/state_layout.h"
#include "tensorrt.hpp"

namespace megalodon::detail {

namespace {

constexpr char kVariable[] = "TENSORRT_LIBRARY";
constexpr char kInstall[] =
    "install it (pip install tensorrt-rtx-cu13 or tensorrt-cu13, or NVIDIA's package) and set TENSORRT_LIBRARY to the "
    "path of libtensorrt_rtx.so or libnvinfer.so, or to its directory";

bool is_rtx(const std::string& flavour) {
    return flavour == "tensorrt-rtx";
}

Library open_library(const SessionOptions& options) {
    const std::vector<std::string> names = is_rtx(options.backend)
                                               ? std::vector<std::string>{"libtensorrt_rtx.so.1", "libtensorrt_rtx.so"}
                                               : std::vector<std::string>{"libnvinfer.so.11", "libnvinfer.so.10"};
    return Library::open(options.library, kVariable, names, kInstall);
}

struct Version {
    explicit Version(const Library& library) {
        const int number = library.get<std::int32_t (*)()>("getInferLibVersion")();
        major = number / 10000;
        text = std::to_string(major) + "." + std::to_string(number / 100 % 100) + "." + std::to_string(number % 100);
    }
    int major;
    std::string text;
};

// The library of the plugins that an engine calls; "" when it calls none.
std::string find_plugins(const EngineInfo& info, const SessionOptions& options) {
    if (!info.plugin_abi) return "";
    const Library library =
        Library::open(options.plugin_library, kPluginLibraryVariable, {kPluginLibraryFile},
                      std::string("build it with `make plugins` and set ") + kPluginLibraryVariable);
    const int found = library.get<std::int32_t (*)()>("mgd_abi_version")();
    if (found != *info.plugin_abi) {
        throw Error(ErrorKind::engine, info.path.string() + " calls plugins of ABI version " +
                                           std::to_string(*info.plugin_abi) + ", " + library.path() + " has " +
                                           std::to_string(found) + "; build it again with `megalodon-deploy build`");
    }
    return library.path();
}

std::unique_ptr<TensorRT> open_abi(const std::string& flavour, const Version& version, const TensorRTRequest& request) {
    [[maybe_unused]] const bool is_abi10 = !is_rtx(flavour) && version.major == 10;
    [[maybe_unused]] const bool is_abi11 = is_rtx(flavour) ? version.major == 1 : version.major == 11;
#ifdef MEGALODON_WITH_TENSORRT10
    if (is_abi10) return open_tensorrt_abi10(request);
#endif
#ifdef MEGALODON_WITH_TENSORRT11
    if (is_abi11) return open_tensorrt_abi11(request);
#endif
    throw Error(ErrorKind::missing_library,
                request.library.path() + " is " + flavour + " " + version.text +
                    ", for which this libmegalodon_runtime was not built: give its headers (TENSORRT_ROOT, "
                    "TENSORRT_RTX_ROOT) when building it");
}

class TensorRTEngine : public GpuEngine {
 public:
    TensorRTEngine(const Bundle& bundle, const SessionOptions& options)
        : GpuEngine(options.device),  // first: without a driver TensorRT's libraries misbehave
          backend_(options.backend),
          library_(open_library(options)) {
        const Version version(library_);
        const EngineInfo info = choose_engine(bundle, {backend_, version.text, gpu().capability()});
        check_engine(info);
        max_batch_ = info.max_batch;
        const MappedFile file(info.path);
        const std::string plugins = find_plugins(info, options);
        const Gpu::Current current(gpu());
        execution_ = open_abi(backend_, version, {library_, plugins, file.data(), file.size(), info.path.string()});
        check_tensors(bundle, execution_->tensor_names(), info.path.string());
    }

    ~TensorRTEngine() override {
        try {
            const Gpu::Current current(gpu());
            execution_.reset();
        } catch (...) {            // the GPU is gone: what was on it, too
            execution_.release();  // NOLINT: its destructor would call a dead driver
        }
    }

    const char* backend() const override { return backend_.c_str(); }
    std::int64_t max_batch() const override { return max_batch_; }

    void run(const std::vector<TensorRef>& inputs, const std::vector<TensorRef>& outputs) override {
        const Gpu::Current current(gpu());
        execution_->enqueue(inputs, outputs, gpu().stream());
    }

 private:
    std::string backend_;
    Library library_;
    std::int64_t max_batch_ = 1;
    std::unique_ptr<TensorRT> execution_;
};

}  // namespace

std::unique_ptr<Engine> open_tensorrt(const Bundle& bundle, const SessionOptions& options) {
    return std::make_unique<TensorRTEngine>(bundle, options);
}

}  // namespace megalodon::detail
