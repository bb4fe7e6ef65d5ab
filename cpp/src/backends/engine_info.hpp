// engine.json: what it says about an engine of a bundle, and which engine runs here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "megalodon/bundle.hpp"

namespace megalodon::detail {

constexpr char kRebuild[] = "; build it again with `megalodon-deploy build`";

// Where a weight lies in the bundle's weight file.
struct WeightPlace {
    std::uint64_t offset = 0, size_bytes = 0;
};

struct EngineInfo {
    std::filesystem::path path;  // of model.engine
    std::string id;
    std::string flavour;  // tensorrt-rtx or tensorrt
    std::string version;  // of that TensorRT, such as 1.7.1.116
    std::vector<int> capabilities;
    bool is_for_later_gpus = false;      // any of Ampere and later
    bool is_for_later_releases = false;  // of TensorRT; it brings a runtime of its own
    bool has_weights_inside = false;
    bool has_streamed_weights = false;  // inside, but what finds no room on the GPU stays in main memory
    std::map<std::string, WeightPlace> bundle_weights;  // inputs that hold weights of the bundle's file, by name
    std::int64_t max_batch = 0;
    std::int64_t max_tokens = 0;  // of a call
    bool has_wide_norms = false;  // norms are updated in float64
    std::string attention;        // standard or plugin: what computes it
    std::string bundle_fingerprint;
    FileEntry engine;
    std::optional<int> plugin_abi;  // of libmegalodon; none: no plugins
};

// Where an engine shall run.
struct Place {
    std::string flavour;
    std::string version;  // of the installed TensorRT: major.minor.patch
    int capability;       // of the GPU, 89 for 8.9
};

// The best engine for this place: one whose norms are updated in float64, then the one for most streams, then one that
// attends as the bundle was exported for, then one with its weights inside, then the one for the fewest kinds of GPU.
// Throws Error (engine), saying what is in the way and what to do, when there is none.
EngineInfo choose_engine(const Bundle& bundle, const Place& place);

// Size and hash: an engine is code. Throws Error (engine).
void check_engine(const EngineInfo& info);

}  // namespace megalodon::detail
