#include "bundle_weights.hpp"

#include "files.hpp"
#include "megalodon/error.hpp"

namespace megalodon::detail {

namespace {

constexpr std::uint64_t kAlignment = 256;  // TensorRT's condition on every tensor's address

std::uint64_t aligned(std::uint64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

void check_sizes(const std::filesystem::path& path, std::uint64_t file_bytes, const EngineInfo& info,
                 const TensorRT& engine) {
    for (const auto& [name, place] : info.bundle_weights) {
        if (const std::uint64_t wanted = engine.tensor_bytes(name); wanted != place.size_bytes) {
            throw Error(ErrorKind::engine, info.path.string() + ": weight " + name + " takes " +
                                               std::to_string(wanted) + " bytes in the engine, engine.json says " +
                                               std::to_string(place.size_bytes) + kRebuild);
        }
        if (place.offset > file_bytes || place.size_bytes > file_bytes - place.offset) {
            throw Error(ErrorKind::engine, path.string() + " ends before weight " + name + "; export the bundle again");
        }
    }
}

}  // namespace

BundleWeights::BundleWeights(const Gpu& gpu, const std::filesystem::path& file, const EngineInfo& info,
                             const TensorRT& engine) {
    if (info.bundle_weights.empty()) return;
    const MappedFile content(file);
    check_sizes(file, content.size(), info, engine);
    std::uint64_t bytes = 0;
    for (const auto& [name, place] : info.bundle_weights)
        bytes += aligned(place.size_bytes);
    memory_ = std::make_unique<GpuMemory>(gpu, bytes);
    auto* next = static_cast<std::byte*>(memory_->data());
    for (const auto& [name, place] : info.bundle_weights) {
        addresses_[name] = next;
        gpu.check(gpu.driver().copy_to_device(reinterpret_cast<CUdeviceptr>(next), content.data() + place.offset,
                                              place.size_bytes, gpu.stream()),
                  "copying weights to the GPU");
        next += aligned(place.size_bytes);
    }
    gpu.check(gpu.driver().stream_synchronize(gpu.stream()), "copying weights to the GPU");  // before it is unmapped
}

void BundleWeights::bind_to(TensorRTContext& context) const {
    for (const auto& [name, address] : addresses_)
        context.bind_weight(name, address);
}

}  // namespace megalodon::detail
