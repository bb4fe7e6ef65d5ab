// Manifests: good, damaged in every way, truncated at every place.
#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>

#include "formats.hpp"
#include "megalodon/bundle.hpp"
#include "refusal.hpp"
#include "tiny_bundle.hpp"

namespace megalodon::test {
namespace {

using Json = nlohmann::json;

std::string refusal(const std::function<void(Json&)>& change) {
    const TemporaryDirectory directory;
    write_bundle(directory.path(), {});
    Json document = Json::parse(manifest_text({}));
    change(document);
    write_text(directory.path() / kManifestFile, document.dump());
    return message_of([&] { Bundle::open(directory.path()); }, ErrorKind::bundle);
}

TEST(Bundle, SaysWhatTheManifestSays) {
    const Bundle bundle = tiny_bundle();
    const Manifest& manifest = bundle.manifest();
    EXPECT_EQ(manifest.vocab_size, 11);
    EXPECT_EQ(manifest.stop_tokens, std::vector<std::int64_t>{10});
    ASSERT_EQ(manifest.state.size(), 5u);
    EXPECT_TRUE(manifest.state[0].is_appended());
    EXPECT_EQ(manifest.state[0].rows_outer(), 2);
    EXPECT_EQ(manifest.state[1].rows_inner(), 5);
    EXPECT_EQ(manifest.state[2].rows_inner(), 1);
    EXPECT_FALSE(manifest.state[3].is_appended());
    EXPECT_EQ(concrete_shape(manifest.state[0].past_shape, 4, 0, 9), (Shape{4, 2, 9, 3}));
}

TEST(Bundle, ADamagedManifestGetsOneClearLine) {
    const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
    EXPECT_PRED2(has, refusal([](Json& d) { d["format"] = "x"; }), "not a manifest");
    EXPECT_PRED2(has, refusal([](Json& d) { d["format_version"] = 99; }), "format version 99");
    EXPECT_PRED2(has, refusal([](Json& d) { d.erase("fingerprint"); }), "'fingerprint' is missing");
    EXPECT_PRED2(has, refusal([](Json& d) { d["precision"] = "fp64"; }), "fp64");
    EXPECT_PRED2(has, refusal([](Json& d) { d["config"]["chunk_size"] = -1; }), "chunk_size = -1");
    EXPECT_PRED2(has, refusal([](Json& d) { d["config"]["vocab_size"] = "many"; }), "vocab_size");
    EXPECT_PRED2(has, refusal([](Json& d) { d["state"][0]["past_shape"][1] = 0; }), "axis 0");
    EXPECT_PRED2(has, refusal([](Json& d) { d["state"][0]["present_shape"][1] = 9; }), "shapes of past_key.0");
    EXPECT_PRED2(has, refusal([](Json& d) { d["state"][3]["dtype"] = "complex64"; }), "complex64");
    EXPECT_PRED2(has, refusal([](Json& d) { d["state"] = 3; }), "");
    EXPECT_PRED2(has, refusal([](Json& d) { d["files"].erase(kModelFile); }), "model.onnx is not listed");
    EXPECT_PRED2(has, refusal([](Json& d) { d["files"]["../x"] = d["files"][kModelFile]; }), "leaves the bundle");
    EXPECT_PRED2(has, refusal([](Json& d) { d["files"]["/x"] = d["files"][kModelFile]; }), "leaves the bundle");
    EXPECT_PRED2(has, refusal([](Json& d) { d["tokenizer"]["kind"] = "runes"; }), "runes");
}

TEST(Bundle, FilesAreThereWithTheirSizesAndHashes) {
    const TemporaryDirectory directory;
    const auto has = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
    EXPECT_PRED2(has, message_of([&] { Bundle::open(directory.path()); }, ErrorKind::bundle), "is not a bundle");
    write_bundle(directory.path(), {});
    Bundle::open(directory.path(), true);
    write_text(directory.path() / kWeightsFile, "WEIGHTS");
    Bundle::open(directory.path());  // of the same size
    EXPECT_PRED2(has, message_of([&] { Bundle::open(directory.path(), true); }, ErrorKind::bundle), "sha256");
    write_text(directory.path() / kWeightsFile, "short");
    EXPECT_PRED2(has, message_of([&] { Bundle::open(directory.path()); }, ErrorKind::bundle),
                 "has 5 bytes, manifest says 7");
    std::filesystem::remove(directory.path() / kWeightsFile);
    EXPECT_PRED2(has, message_of([&] { Bundle::open(directory.path()); }, ErrorKind::bundle), "is missing");
}

TEST(Bundle, ATruncatedManifestIsRefusedWhereverItEnds) {
    const TemporaryDirectory directory;
    write_bundle(directory.path(), {});
    const std::string text = manifest_text({});
    for (std::size_t length = 0; length < text.size(); length += 7) {
        write_text(directory.path() / kManifestFile, text.substr(0, length));
        message_of([&] { Bundle::open(directory.path()); }, ErrorKind::bundle);
    }
}

}  // namespace
}  // namespace megalodon::test
