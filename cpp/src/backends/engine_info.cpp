#include "engine_info.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <tuple>

#include "files.hpp"
#include "formats.hpp"
#include "megalodon/state_layout.h"

namespace megalodon::detail {

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int kAmpere = 80;

[[noreturn]] void fail(const std::string& message) {
    throw Error(ErrorKind::engine, message);
}

EngineInfo read(const fs::path& directory) {
    const fs::path path = directory / kEngineInfoFile;
    try {
        const Json values = Json::parse(read_text(path));
        if (values.at("format_version") != kEngineInfoVersion) {
            fail(path.string() + ": format version " + values.at("format_version").dump() + ", this release reads " +
                 std::to_string(kEngineInfoVersion) + kRebuild);
        }
        EngineInfo info;
        info.path = directory / kEngineFile;
        info.id = values.at("id").get<std::string>();
        info.flavour = values.at("flavour").get<std::string>();
        info.version = values.at("version").get<std::string>();
        info.capabilities = values.at("compute_capabilities").get<std::vector<int>>();
        info.is_for_later_gpus = values.at("hardware_compatible").get<bool>();
        info.is_for_later_releases = values.at("version_compatible").get<bool>();
        info.has_weights_inside = values.at("weights") == "engine";
        info.has_streamed_weights = values.at("weights") == "streamed";
        for (const auto& [name, place] : values.at("bundle_weights").items()) {
            info.bundle_weights[name] = {place.at("offset").get<std::uint64_t>(),
                                         place.at("size_bytes").get<std::uint64_t>()};
        }
        info.max_batch = values.at("max_batch").get<std::int64_t>();
        info.max_tokens = values.at("profile").at(kTokens).at("max").at(1).get<std::int64_t>();
        info.has_wide_norms = values.at("norm_update") == "float64";
        const auto plugins = values.at("plugins").get<std::vector<std::string>>();
        info.attention = std::count(plugins.begin(), plugins.end(), kAttentionOperator) > 0 ? "plugin" : "standard";
        info.bundle_fingerprint = values.at("bundle_fingerprint").get<std::string>();
        const Json& file = values.at("engine");
        info.engine = {file.at("sha256").get<std::string>(), file.at("size_bytes").get<std::uint64_t>()};
        const Json& library = values.at("plugin_library");
        if (!library.is_null()) info.plugin_abi = library.at("abi_version").get<int>();
        return info;
    } catch (const Json::exception& error) {
        fail(path.string() + ": " + error.what() + kRebuild);
    }
}

// Directories of finished engines; one that is being written begins with a dot.
std::vector<EngineInfo> list_engines(const Bundle& bundle) {
    std::vector<EngineInfo> engines;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(bundle.path() / kEnginesDir, error)) {
        const bool is_hidden = entry.path().filename().string().front() == '.';
        if (!is_hidden && fs::is_regular_file(entry.path() / kEngineInfoFile, error)) engines.push_back(read(entry));
    }
    return engines;
}

// Major, minor and patch of a version: more is not known of the installed one.
std::array<int, 3> numbers(const std::string& version) {
    std::array<int, 3> found{};
    std::sscanf(version.c_str(), "%d.%d.%d", &found[0], &found[1], &found[2]);
    return found;
}

// An engine needs the very version that built it, or one that is no older if it is version-compatible.
bool runs_in(const EngineInfo& info, const std::string& version) {
    const std::array<int, 3> built = numbers(info.version), here = numbers(version);
    return built == here || (info.is_for_later_releases && built[0] == here[0] && built < here);
}

}  // namespace

EngineInfo choose_engine(const Bundle& bundle, const Place& place) {
    std::vector<EngineInfo> left = list_engines(bundle);
    const std::string where = bundle.path().string();
    const std::string build = "`megalodon-deploy build " + where + " --target " + place.flavour + "`";
    if (left.empty()) fail(where + " has no engine; build one: " + build);
    const auto keep = [&](const std::function<bool(const EngineInfo&)>& fits, const std::string& objection) {
        const std::string first = left.front().id;
        left.erase(std::remove_if(left.begin(), left.end(), [&](const auto& info) { return !fits(info); }), left.end());
        if (left.empty()) fail(where + ": engine " + first + " " + objection + ": " + build);
    };
    const std::string capability = std::to_string(place.capability / 10) + "." + std::to_string(place.capability % 10);
    keep([&](const EngineInfo& info) { return info.flavour == place.flavour; },
         "is for another flavour than " + place.flavour + "; build one");
    keep([&](const EngineInfo& info) { return info.bundle_fingerprint == bundle.manifest().fingerprint; },
         "was built from another export; build it again");
    keep(
        [&](const EngineInfo& info) {
            return std::count(info.capabilities.begin(), info.capabilities.end(), place.capability) > 0 ||
                   (info.is_for_later_gpus && place.capability >= kAmpere);
        },
        "is not for this GPU's compute capability " + capability + "; build one on or for it");
    keep([&](const EngineInfo& info) { return runs_in(info, place.version); },
         "needs another version of TensorRT than " + place.version + ", which is installed; install it or build again");
    keep([&](const EngineInfo& info) { return info.max_tokens == bundle.manifest().chunk_size; },
         "has the shapes of another release; build it again");
    const auto preference = [&](const EngineInfo& info) {
        const auto num_others = static_cast<std::int64_t>(info.capabilities.size());
        const bool is_as_exported = info.attention == bundle.manifest().attention;
        return std::make_tuple(info.has_wide_norms, info.max_batch, is_as_exported, info.has_weights_inside,
                               !info.is_for_later_gpus, -num_others, info.id);
    };
    return *std::max_element(left.begin(), left.end(), [&](const EngineInfo& one, const EngineInfo& other) {
        return preference(one) < preference(other);
    });
}

void check_engine(const EngineInfo& info) {
    std::error_code error;
    const std::uint64_t size = fs::file_size(info.path, error);
    if (error) fail(info.path.string() + " is missing" + kRebuild);
    if (size != info.engine.size_bytes) {
        fail(info.path.string() + " has " + std::to_string(size) + " bytes, engine.json says " +
             std::to_string(info.engine.size_bytes) + kRebuild);
    }
    const std::string hash = sha256_file(info.path);
    if (hash != info.engine.sha256) {
        fail(info.path.string() + ": sha256 is " + hash.substr(0, 12) + "..., engine.json says " +
             info.engine.sha256.substr(0, 12) + "..." + kRebuild);
    }
}

}  // namespace megalodon::detail
