// The TensorRT backend on a stand-in for a GPU machine (fake_device.hpp): graphs, choices, memory, errors.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <nlohmann/json.hpp>

#include "fake_engine.hpp"
#include "fake_gpu.hpp"
#include "files.hpp"
#include "formats.hpp"
#include "megalodon/log.hpp"
#include "refusal.hpp"
#include "schedule.hpp"
#include "tiny_bundle.hpp"

namespace megalodon::test {
namespace {

using Json = nlohmann::json;

struct Flavour {
    const char* name;
    const char* backend;
    const char* library;
    std::int32_t number;  // as getInferLibVersion gives it
    const char* version;
};

class Gpu : public testing::TestWithParam<Flavour> {
 protected:
    void SetUp() override {
        void* library = ::dlopen(GetParam().library, RTLD_NOW | RTLD_LOCAL);
        ASSERT_NE(library, nullptr) << ::dlerror();
        control_ = static_cast<FakeGpuControl*>(::dlsym(library, "fake_gpu_control"));
        *control_ = {};
        control_->tensorrt_version = GetParam().number;
        ::setenv("MEGALODON_CUDA_DRIVER", GetParam().library, 1);
        write_bundle(directory_.path(), {});
        std::filesystem::create_directories(directory_.path() / kEnginesDir / "only");
        info_ = engine_json("only");
        info_["flavour"] = GetParam().backend;
        info_["version"] = GetParam().version;
        write_engine("12");
    }
    void TearDown() override {
        EXPECT_EQ(control_->num_live, 0) << "not everything was given back";
        ::unsetenv("MEGALODON_CUDA_DRIVER");
    }

    void write_engine(const std::string& text) {
        const auto path = directory_.path() / kEnginesDir / "only" / kEngineFile;
        write_text(path, text);
        info_["engine"] = {{"sha256", detail::sha256_file(path)}, {"size_bytes", text.size()}};
        write_info();
    }
    void write_info() { write_text(directory_.path() / kEnginesDir / "only" / kEngineInfoFile, info_.dump()); }

    // An engine without two weights, and a bundle that has them.
    void write_engine_without_weights() {
        const auto manifest_path = directory_.path() / kManifestFile, path = directory_.path() / kWeightsFile;
        write_text(path, "_matrix___codes_");
        Json manifest = Json::parse(detail::read_text(manifest_path));
        manifest["files"][kWeightsFile] = {{"sha256", detail::sha256_file(path)}, {"size_bytes", 16}};
        write_text(manifest_path, manifest.dump());
        info_["weights"] = "bundle";
        info_["bundle_weights"] = {{"a", {{"offset", 10}, {"size_bytes", 5}, {"shape", {1, 9}}}},
                                   {"b", {{"offset", 1}, {"size_bytes", 6}, {"shape", {1, 3}}}}};
        write_engine("12 b half matrix a int4 codes");
    }

    Session session() const { return session(Bundle::open(directory_.path())); }
    Session session(const Bundle& bundle) const {
        SessionOptions options;
        options.backend = GetParam().backend;
        options.library = options.plugin_library = GetParam().library;
        return Session(bundle, options);
    }
    Session on_cpu() const { return Session(Bundle::open(directory_.path()), std::make_unique<FakeEngine>()); }

    std::string refusal(ErrorKind kind) const {
        return message_of([&] { session().stream().step(1); }, kind);
    }

    TemporaryDirectory directory_;
    FakeGpuControl* control_ = nullptr;
    Json info_;
};

bool has(const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
}

TEST_P(Gpu, RandomSchedulesEqualEachStreamAlone) {
    Session shared = session(), alone = on_cpu();
    Schedule schedule(shared, alone, 4, directory_.path());
    for (int step = 0; step < 3'000 && !HasFatalFailure(); ++step)
        schedule.step();
    EXPECT_GT(schedule.num_compared, 3'000);
    EXPECT_EQ(control_->num_captures, 2);  // one for each half of the pair
}

// Of each half of the pair the first step runs plainly, the second is captured and launched, the others are launched.
TEST_P(Gpu, AGeneratedTokenIsALaunchAndOneWait) {
    Session shared = session(), alone = on_cpu();
    Stream stream = shared.stream(), twin = alone.stream();
    GenerateOptions options;
    options.max_new_tokens = 5;
    options.stop_tokens = std::vector<std::int64_t>{};
    options.sampling.temperature = 1.5;
    options.sampling.seed = 3;
    options.sampling.repetition_penalty = 1.3;
    std::vector<std::int64_t> tokens, expected;
    const auto into = [](std::vector<std::int64_t>& kept) {
        return [&kept](const GeneratedToken& item) {
            kept.push_back(item.token);
            return true;
        };
    };
    stream.generate({1, 2, 3}, options, into(tokens));
    const int calls = control_->num_calls, waits = control_->num_synchronisations;
    const int launches = control_->num_launches;
    EXPECT_EQ(launches, 2);
    options.max_new_tokens = 40;
    stream.generate(std::vector<std::int64_t>{}, options, into(tokens));
    EXPECT_EQ(control_->num_launches - launches, 40);
    EXPECT_EQ(control_->num_calls, calls) << "TensorRT is not asked any more";
    EXPECT_EQ(control_->num_synchronisations - waits, 40);
    options.max_new_tokens = 45;
    twin.generate({1, 2, 3}, options, into(expected));
    EXPECT_EQ(tokens, expected);
}

TEST_P(Gpu, PiecesOfAPromptShareTheirMemory) {
    Session shared = session(), alone = on_cpu();
    StreamBatch batch = shared.batch(2);
    Stream streams[] = {batch.admit(), batch.admit()}, twins[] = {alone.stream(), alone.stream()};
    EXPECT_EQ(streams[0].prefill({1, 2, 3, 4, 5}), twins[0].prefill({1, 2, 3, 4, 5}));
    const int allocations = control_->num_allocations;
    for (const int which : {1, 0, 1}) {
        EXPECT_EQ(streams[which].prefill({1, 2, 3}), twins[which].prefill({1, 2, 3}));
        EXPECT_EQ(streams[which].prefill({7, 8, 9, 10}), twins[which].prefill({7, 8, 9, 10}));
    }
    EXPECT_EQ(control_->num_allocations, allocations);
}

TEST_P(Gpu, WithoutGraphsStepsRunPlainly) {
    control_->refuses_capture = true;
    Session shared = session(), alone = on_cpu();
    Stream stream = shared.stream(), twin = alone.stream();
    for (int step = 0; step < 30; ++step)
        ASSERT_EQ(stream.step(step % 11), twin.step(step % 11));
    EXPECT_EQ(control_->num_launches, 0);
}

TEST_P(Gpu, ForksAndSavedStreamsMoveBetweenGpuAndCpu) {
    Session shared = session(), alone = on_cpu();
    Stream stream = shared.stream();
    stream.prefill({1, 2, 3, 4, 5});
    stream.save(directory_.path() / "stream");
    Stream twin = alone.resume(directory_.path() / "stream"), fork = stream.fork();
    EXPECT_EQ(stream.logits(), twin.logits());
    EXPECT_EQ(stream.step(7), twin.step(7));
    EXPECT_EQ(fork.step(7), twin.logits());
    twin.save(directory_.path() / "stream");
    EXPECT_EQ(shared.resume(directory_.path() / "stream").step(8), twin.step(8));
}

TEST_P(Gpu, WhatIsRefusedIsOneLineAndNothingIsLost) {
    control_->refuses_calls = true;
    EXPECT_PRED2(has, refusal(ErrorKind::engine), "TensorRT refused the call (it gave no reason)");
    control_->refuses_calls = false;
    write_engine("damaged");
    EXPECT_PRED2(has, refusal(ErrorKind::engine), "TensorRT cannot load it (no engine of the stand-in)");
    write_engine("12");
    info_["plugin_library"]["abi_version"] = 1;
    write_info();
    EXPECT_PRED2(has, refusal(ErrorKind::engine), "calls plugins of ABI version 1");
    info_["plugin_library"]["abi_version"] = 2;
    control_->tensorrt_version = 90300;
    info_["version"] = "9.3.0";
    write_info();
    EXPECT_PRED2(has, refusal(ErrorKind::missing_library), "9.3.0, for which this libmegalodon_runtime was not built");
}

TEST_P(Gpu, WeightsOfTheBundleAreCopiedOnceAndBoundInEveryContext) {
    const auto num_allocations = [&] {
        const int before = control_->num_allocations;
        Session shared = session(), alone = on_cpu();
        Stream stream = shared.stream(), twin = alone.stream();
        EXPECT_EQ(stream.prefill({1, 2, 3, 4, 5}), twin.prefill({1, 2, 3, 4, 5}));
        for (int step = 0; step < 30; ++step)
            EXPECT_EQ(stream.step(step % 11), twin.step(step % 11));
        EXPECT_EQ(stream.prefill({1, 2, 3}), twin.prefill({1, 2, 3}));
        return control_->num_allocations - before;
    };
    const int with_weights_inside = num_allocations();
    write_engine_without_weights();
    EXPECT_EQ(num_allocations(), with_weights_inside + 1);
}

TEST_P(Gpu, WeightsThatAreNotThoseOfTheEngineAreRefused) {
    write_engine_without_weights();
    const auto refused = [&](const char* name, const char* key, std::int64_t value) {
        const Json before = info_;
        info_["bundle_weights"][name][key] = value;
        write_info();
        const std::string message = refusal(ErrorKind::engine);
        info_ = before;
        return message;
    };
    EXPECT_PRED2(has, refused("a", "offset", 9), "a call of the model failed") << "the stand-in sees other bytes";
    EXPECT_PRED2(has, refused("a", "size_bytes", 6), "weight a takes 5 bytes in the engine, engine.json says 6");
    EXPECT_PRED2(has, refused("b", "size_bytes", 5), "weight b takes 6 bytes in the engine, engine.json says 5");
    for (const std::int64_t offset : {12, 17, -1})
        EXPECT_PRED2(has, refused("a", "offset", offset), "model.onnx.data ends before weight a; export the bundle");
    write_info();
    const Bundle bundle = Bundle::open(directory_.path());
    write_text(directory_.path() / kWeightsFile, "_matrix___code");
    const auto open = [&] { session(bundle); };
    EXPECT_PRED2(has, message_of(open, ErrorKind::engine), "model.onnx.data ends before weight a");
    std::filesystem::remove(directory_.path() / kWeightsFile);
    EXPECT_PRED2(has, message_of(open, ErrorKind::io), "model.onnx.data: cannot be read");
    EXPECT_PRED2(has, refusal(ErrorKind::bundle), "model.onnx.data is missing");
    write_engine_without_weights();
    info_["bundle_weights"].erase("a");
    write_info();
    EXPECT_PRED2(has, refusal(ErrorKind::bundle), "tensor a is not in both");
}

TEST_P(Gpu, StreamedWeightsGetWhatRoomThereIsBeforeTheFirstContext) {
    session();
    EXPECT_EQ(control_->streaming_budget, -1);
    info_["weights"] = "streamed";
    write_info();
    session();
    EXPECT_EQ(control_->streaming_budget, kStreamingBudget);
}

TEST_P(Gpu, OnlyAnEngineForLaterReleasesMayBringCodeOfItsOwn) {
    session();
    EXPECT_FALSE(control_->is_host_code_allowed);
    info_["version_compatible"] = true;
    write_info();
    session();
    EXPECT_TRUE(control_->is_host_code_allowed);
}

TEST_P(Gpu, MessagesOfTensorRTGoToTheLogger) {
    std::string messages;
    set_logger([&](LogLevel level, std::string_view text) {
        if (level == LogLevel::warning) messages += text;
    });
    session();
    set_logger({});
    EXPECT_EQ(messages, "TensorRT: a warning of the stand-in");
}

// Those whose headers are there.
std::vector<Flavour> flavours() {
    return {
#ifdef FAKE_GPU10
        {"TensorRT10", "tensorrt", FAKE_GPU10, 101401, "10.14.1.48"},
#endif
#ifdef FAKE_GPU11
        {"TensorRT11", "tensorrt", FAKE_GPU11, 110101, "11.1.1.2"},
        {"TensorRTRTX", "tensorrt-rtx", FAKE_GPU11, 10701, "1.7.1.116"},
#endif
    };
}

INSTANTIATE_TEST_SUITE_P(Flavours, Gpu, testing::ValuesIn(flavours()),
                         [](const auto& tested) { return std::string(tested.param.name); });

}  // namespace
}  // namespace megalodon::test
