// Memory that runs out must become an error status: an exception that leaves a noexcept function ends the process.
#include <cstdlib>
#include <new>

#include "tests/plugin_test.h"

namespace {

int64_t allocations_left = -1;  // negative: any number

void* allocate(std::size_t num_bytes) {
    if (allocations_left == 0) throw std::bad_alloc();
    if (allocations_left > 0) --allocations_left;
    if (void* memory = std::malloc(num_bytes > 0 ? num_bytes : 1)) return memory;
    throw std::bad_alloc();
}

}  // namespace

// These replace the library's as well, which is loaded into this program.
void* operator new(std::size_t num_bytes) {
    return allocate(num_bytes);
}
void* operator new[](std::size_t num_bytes) {
    return allocate(num_bytes);
}
void operator delete(void* memory) noexcept {
    std::free(memory);
}
void operator delete[](void* memory) noexcept {
    std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
    std::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
    std::free(memory);
}

namespace megalodon::tests {
namespace {

constexpr int64_t kMostAllocations = 1'000'000;

class Memory : public PluginTest {
 protected:
    void SetUp() override {
        plugin_ = create_with_good_fields(op());
        ASSERT_NE(plugin_, nullptr);
        testing::internal::CaptureStderr();
    }
    void TearDown() override { testing::internal::GetCapturedStderr(); }

    /// Lets memory run out after 0, 1, 2 ... allocations, in wider steps later on, until `works()` is true; true if it
    /// was false before that.
    template <typename Works>
    bool fails_until_there_is_enough(Works works) {
        for (int64_t count = 0; count < kMostAllocations; count += 1 + count / 8) {
            allocations_left = count;
            const bool has_worked = works();
            allocations_left = -1;
            if (has_worked) return count > 0;
        }
        return false;
    }
    PluginPointer plugin_;
};
MEGALODON_TEST_EVERY_PLUGIN(Memory);

TEST_P(Memory, RunsOutInCreatePlugin) {
    auto& creator = creator_of(op());
    const nvinfer1::PluginFieldCollection* fields = runtime_of(plugin_).getFieldsToSerialize();
    EXPECT_TRUE(fails_until_there_is_enough([&] {
        return PluginPointer(creator.createPlugin("layer", fields, nvinfer1::TensorRTPhase::kRUNTIME)) != nullptr;
    }));
}

TEST_P(Memory, RunsOutInTheMessageOfAnError) {
    auto& creator = creator_of(op());
    const float value = 1.0f;
    const nvinfer1::PluginField field{"a_field_with_a_long_name_that_no_operator_has", &value,
                                      nvinfer1::PluginFieldType::kFLOAT32, 1};
    const nvinfer1::PluginFieldCollection fields{1, &field};
    for (int count = 0; count < 20; ++count) {
        allocations_left = count;
        const nvinfer1::IPluginV3* plugin = creator.createPlugin("layer", &fields, nvinfer1::TensorRTPhase::kBUILD);
        allocations_left = -1;
        EXPECT_EQ(plugin, nullptr);
    }
}

TEST_P(Memory, RunsOutInCopies) {
    EXPECT_TRUE(fails_until_there_is_enough([&] { return PluginPointer(plugin_->clone()) != nullptr; }));
    EXPECT_TRUE(fails_until_there_is_enough(
        [&] { return PluginPointer(runtime_of(plugin_).attachToContext(nullptr)) != nullptr; }));
}

TEST_P(Memory, RunsOutInSerialisation) {
    const bool fails = fails_until_there_is_enough([&] {
        const PluginPointer fresh(plugin_->clone());
        return fresh != nullptr && runtime_of(fresh).getFieldsToSerialize() != nullptr;
    });
    EXPECT_TRUE(fails);
}

TEST_P(Memory, RunsOutInConfigurationAndShapes) {
    const auto descs = describe(op());
    const auto dynamic = describe_dynamic(descs);
    EXPECT_TRUE(fails_until_there_is_enough([&] {
        return build_of(plugin_).configurePlugin(dynamic.data(), num_inputs(), dynamic.data() + num_inputs(),
                                                 num_outputs()) == 0;
    }));
    EXPECT_TRUE(fails_until_there_is_enough([&] {
        return runtime_of(plugin_).onShapeChange(descs.data(), num_inputs(), descs.data() + num_inputs(),
                                                 num_outputs()) == 0;
    }));
    const auto workspace_bytes = [&] {
        return build_of(plugin_).getWorkspaceSize(dynamic.data(), num_inputs(), dynamic.data() + num_inputs(),
                                                  num_outputs());
    };
    const size_t expected = workspace_bytes();
    EXPECT_EQ(fails_until_there_is_enough([&] { return workspace_bytes() == expected; }), expected > 0);
}

TEST_P(Memory, RunsOutInEnqueue) {
    if (!library().runs_on_host) GTEST_SKIP() << "needs a GPU";
    HostTensors tensors(op()), expected(op());
    ASSERT_EQ(enqueue(plugin_, op(), expected), 0);  // the emulation has its fibers from here on
    ASSERT_EQ(enqueue(plugin_, op(), tensors), 0);
    const auto descs = describe(op());
    EXPECT_TRUE(fails_until_there_is_enough([&] {
        return runtime_of(plugin_).enqueue(descs.data(), descs.data() + num_inputs(), tensors.call.inputs.data(),
                                           tensors.call.outputs.data(), tensors.call.workspace, nullptr) == 0;
    }));
    EXPECT_TRUE(tensors.equals(expected));
}

}  // namespace
}  // namespace megalodon::tests
