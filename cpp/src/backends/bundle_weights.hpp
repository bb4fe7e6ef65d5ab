// Weights that an engine has as inputs: on the GPU, once for all of its contexts.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "engine_info.hpp"
#include "gpu.hpp"
#include "tensorrt.hpp"

namespace megalodon::detail {

class BundleWeights {
 public:
    // Copies from `file`, the bundle's weights, what `engine` lacks, while the GPU's context is current. Throws Error:
    // engine when a weight is not all there or not as large as the engine's input, and when memory is short; io.
    BundleWeights(const Gpu& gpu, const std::filesystem::path& file, const EngineInfo& info, const TensorRT& engine);

    void bind_to(TensorRTContext& context) const;  // throws Error (engine)

 private:
    std::unique_ptr<GpuMemory> memory_;
    std::map<std::string, void*> addresses_;
};

}  // namespace megalodon::detail
