// Which engine, which library, which ABI: everything about TensorRT but the calls into it.
#include <cstdlib>
#include <set>

#include "backends.hpp"
#include "bundle_weights.hpp"
#include "engine_info.hpp"
#include "files.hpp"
#include "formats.hpp"
#include "gpu.hpp"
#include "kernels.hpp"
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

Library open_plugins(const SessionOptions& options) {
    return Library::open(options.plugin_library, kPluginLibraryVariable, {kPluginLibraryFile},
                         std::string("build it with `make plugins` and set ") + kPluginLibraryVariable);
}

void check_plugins(const EngineInfo& info, const Library& library, const Kernels& kernels) {
    if (!info.plugin_abi || *info.plugin_abi == kernels.abi_version()) return;
    throw Error(ErrorKind::engine, info.path.string() + " calls plugins of ABI version " +
                                       std::to_string(*info.plugin_abi) + ", " + library.path() + " has " +
                                       std::to_string(kernels.abi_version()) + kRebuild);
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

// A decode step in a context of its own: the call and the appending of its rows, as one CUDA graph.
class TensorRTStep : public PreparedStep {
 public:
    TensorRTStep(const Gpu& gpu, const Kernels& kernels, std::unique_ptr<TensorRTContext> context, StepPlan plan)
        : gpu_(gpu), context_(std::move(context)) {
        context_->bind(plan.inputs, plan.outputs);
        work_ = std::make_unique<RepeatedWork>(gpu, [this, &kernels, plan = std::move(plan)] {
            context_->enqueue(gpu_.stream());
            kernels.append_rows(plan, gpu_.stream());
        });
    }

    ~TensorRTStep() override {
        try {
            const Gpu::Current current(gpu_);
            gpu_.driver().stream_synchronize(gpu_.stream());  // it may still run
            work_.reset();
            context_.reset();
        } catch (...) {          // the GPU is gone: what was on it, too
            work_.release();     // NOLINT: their destructors would call a dead driver
            context_.release();  // NOLINT
        }
    }

    void run() override {
        const Gpu::Current current(gpu_);
        work_->run();
    }

 private:
    const Gpu& gpu_;
    std::unique_ptr<TensorRTContext> context_;
    std::unique_ptr<RepeatedWork> work_;
};

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
        const Library plugins = open_plugins(options);
        kernels_ = std::make_unique<Kernels>(plugins);
        check_plugins(info, plugins, *kernels_);
        const Gpu::Current current(gpu());
        const std::string plugin_path = info.plugin_abi ? plugins.path() : "";
        execution_ = open_abi(backend_, version,
                              {library_, plugin_path, file.data(), file.size(), info.is_for_later_releases,
                               info.has_streamed_weights, info.path.string()});
        std::set<std::string> weights;
        for (const auto& [name, place] : info.bundle_weights)
            weights.insert(name);
        check_tensors(bundle, weights, execution_->tensor_names(), info.path.string());
        weights_ = std::make_unique<BundleWeights>(gpu(), bundle.path() / kWeightsFile, info, *execution_);
        scratch_ = std::make_unique<GpuMemory>(gpu(), execution_->scratch_bytes());
        context_ = open_context(false);
    }

    ~TensorRTEngine() override {
        try {
            const Gpu::Current current(gpu());
            gpu().driver().stream_synchronize(gpu().stream());
            context_.reset();
            execution_.reset();
        } catch (...) {            // the GPU is gone: what was on it, too
            context_.release();    // NOLINT: their destructors would call a dead driver
            execution_.release();  // NOLINT
        }
    }

    const char* backend() const override { return backend_.c_str(); }
    std::int64_t max_batch() const override { return max_batch_; }

    void run(const std::vector<TensorRef>& inputs, const std::vector<TensorRef>& outputs) override {
        const Gpu::Current current(gpu());
        context_->bind(inputs, outputs);
        context_->enqueue(gpu().stream());
    }

    std::unique_ptr<PreparedStep> prepare_step(StepPlan plan) override {
        const Gpu::Current current(gpu());
        return std::make_unique<TensorRTStep>(gpu(), *kernels_, open_context(true), std::move(plan));
    }

    std::vector<std::int64_t> choose(const void* logits, std::int64_t vocab_size,
                                     const std::vector<TokenChoice>& choices) override {
        const Gpu::Current current(gpu());
        return kernels_->choose(gpu(), static_cast<const float*>(logits), vocab_size, choices);
    }

 private:
    std::unique_ptr<TensorRTContext> open_context(bool has_fixed_shapes) {
        auto context = execution_->open_context(scratch_->data(), has_fixed_shapes);
        weights_->bind_to(*context);
        return context;
    }

    std::string backend_;
    Library library_;
    std::int64_t max_batch_ = 1;
    std::unique_ptr<Kernels> kernels_;
    std::unique_ptr<BundleWeights> weights_;
    std::unique_ptr<GpuMemory> scratch_;
    std::unique_ptr<TensorRT> execution_;
    std::unique_ptr<TensorRTContext> context_;  // of pieces of a prompt
};

}  // namespace

std::unique_ptr<Engine> open_tensorrt(const Bundle& bundle, const SessionOptions& options) {
    return std::make_unique<TensorRTEngine>(bundle, options);
}

}  // namespace megalodon::detail
