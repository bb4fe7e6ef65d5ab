// Which engine of a bundle runs where; nothing is loaded.
#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>

#include "backends/backends.hpp"
#include "backends/engine_info.hpp"
#include "formats.hpp"
#include "megalodon/session.hpp"
#include "refusal.hpp"
#include "tiny_bundle.hpp"

namespace megalodon::test {
namespace {

using detail::choose_engine;
using detail::EngineInfo;
using Json = nlohmann::json;

class Engines : public testing::Test {
 protected:
    void SetUp() override { write_bundle(directory_.path(), {}); }

    void add(const std::string& id, const std::function<void(Json&)>& change = [](Json&) {}) {
        Json document = engine_json(id);
        change(document);
        const auto folder = directory_.path() / kEnginesDir / id;
        std::filesystem::create_directories(folder);
        write_text(folder / kEngineInfoFile, document.dump());
        write_text(folder / kEngineFile, "weights");
    }
    EngineInfo choose() { return choose_engine(Bundle::open(directory_.path()), {"tensorrt-rtx", "1.7.1", 89}); }
    std::string refusal() {
        return message_of([&] { choose(); }, ErrorKind::engine);
    }
    TemporaryDirectory directory_;
};

bool has(const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
}

TEST_F(Engines, TheBestOfThoseThatFitIsTaken) {
    add("portable", [](Json& d) { d["compute_capabilities"] = {80}, d["hardware_compatible"] = true; });
    EXPECT_EQ(choose().id, "portable");
    add("exact", [](Json& d) { d["compute_capabilities"] = {89}; });
    EXPECT_EQ(choose().id, "exact");
    add("narrow", [](Json& d) { d["norm_update"] = "float32", d["max_batch"] = 64; });
    add("small");
    add("large", [](Json& d) { d["max_batch"] = 8; });
    add("outside", [](Json& d) { d["max_batch"] = 8, d["weights"] = "bundle", d["compute_capabilities"] = {89}; });
    add("streamed", [](Json& d) { d["max_batch"] = 8, d["weights"] = "streamed", d["compute_capabilities"] = {89}; });
    add("foreign", [](Json& d) { d["max_batch"] = 99, d["compute_capabilities"] = {90}; });
    add(".unfinished", [](Json& d) { d = 3; });
    add("plugin", [](Json& d) { d["max_batch"] = 8, d["plugins"] = {kAttentionOperator}; });
    const EngineInfo info = choose();
    EXPECT_EQ(info.id, "large") << "which attends as the bundle was exported for";
    EXPECT_EQ(info.plugin_abi, 2);
    detail::check_engine(info);
}

TEST_F(Engines, WhatIsInTheWayIsSaid) {
    EXPECT_PRED2(has, refusal(), "has no engine; build one: `megalodon-deploy build");
    const auto refused = [&](const std::function<void(Json&)>& change) {
        add("only", change);
        return refusal();
    };
    EXPECT_PRED2(has, refused([](Json& d) { d["flavour"] = "tensorrt"; }), "another flavour than tensorrt-rtx");
    EXPECT_PRED2(has, refused([](Json& d) { d["bundle_fingerprint"] = "x"; }), "another export");
    EXPECT_PRED2(has, refused([](Json& d) { d["compute_capabilities"] = {80}; }), "compute capability 8.9");
    EXPECT_PRED2(has, refused([](Json& d) { d["version"] = "1.7.10"; }), "another version of TensorRT than 1.7.1");
    EXPECT_PRED2(has, refused([](Json& d) { d["profile"]["tokens"]["max"] = {4, 6}; }), "another release");
    EXPECT_PRED2(has, refused([](Json& d) { d["format_version"] = 9; }), "format version 9");
    EXPECT_PRED2(has, refused([](Json& d) { d.erase("max_batch"); }), "max_batch");
    EXPECT_PRED2(has, refused([](Json& d) { d["bundle_weights"] = {{"w", {{"offset", 0}}}}; }), "size_bytes");
}

TEST_F(Engines, CompatibleOnesServeLaterReleasesOfTheSameMajorVersion) {
    const auto serves = [&](const char* version) {
        add("only", [&](Json& d) { d["version_compatible"] = true, d["version"] = version; });
        try {
            return choose().id == "only";
        } catch (const Error&) {
            return false;
        }
    };
    for (const char* version : {"1.7.1.116", "1.7.0.9", "1.6.12.3"})
        EXPECT_TRUE(serves(version)) << version;
    for (const char* version : {"1.7.2.0", "1.10.0.1", "0.9.9.9", "2.0.0.1"})
        EXPECT_FALSE(serves(version)) << version;
}

TEST_F(Engines, ADamagedEngineIsNotLoaded) {
    add("only");
    const auto path = directory_.path() / kEnginesDir / "only" / kEngineFile;
    const auto check = [&] {
        try {
            detail::check_engine(choose());
        } catch (const Error& error) {
            return std::string(error.what());
        }
        return std::string();
    };
    EXPECT_EQ(check(), "");
    write_text(path, "WEIGHTS");
    EXPECT_PRED2(has, check(), "sha256 is");
    write_text(path, "short");
    EXPECT_PRED2(has, check(), "has 5 bytes");
    std::filesystem::remove(path);
    EXPECT_PRED2(has, check(), "is missing");
}

}  // namespace
}  // namespace megalodon::test
