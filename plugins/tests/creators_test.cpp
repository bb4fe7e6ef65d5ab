// Creation from fields, errors in fields, serialisation, copies: for every plugin of the library.
#include <dlfcn.h>

#include <cmath>
#include <set>

#include "register/slots.h"
#include "tests/harness.h"
#include "tests/plugin_test.h"

namespace megalodon::tests {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

TEST(Library, EveryPluginIsDescribedAndEveryDescriptionHasAPlugin) {
    std::multiset<std::string> listed;
    for (const auto* creator : creators()) {
        listed.insert(creator->getPluginName());
    }
    std::set<std::string> described;
    for (const Operator& op : operators()) {
        described.insert(op.name);
    }
    EXPECT_EQ(listed, std::multiset<std::string>(described.begin(), described.end()));
}

TEST(Library, TheLoggerFinderIsIgnored) {
    auto* set_logger_finder = reinterpret_cast<void (*)(void*)>(dlsym(library().handle, "setLoggerFinder"));
    ASSERT_NE(set_logger_finder, nullptr);
    set_logger_finder(nullptr);
}

/// In the Itanium C++ ABI, a pointer to a virtual member function holds its offset in the table of functions; on x86
/// plus 1, which marks it as virtual (ARM marks it elsewhere).
TEST(Library, TheRegisterLibraryKnowsTheSlotOfTheseHeaders) {
#if defined(__x86_64__)
    constexpr std::ptrdiff_t kMark = 1;
#elif defined(__aarch64__)
    constexpr std::ptrdiff_t kMark = 0;
#endif
    bool (nvinfer1::IPluginRegistry::*member)(nvinfer1::IPluginCreatorInterface&, const char*) =
        &nvinfer1::IPluginRegistry::registerCreator;
    std::ptrdiff_t offset = 0;
    std::memcpy(&offset, &member, sizeof(offset));
    EXPECT_EQ((offset - kMark) / static_cast<std::ptrdiff_t>(sizeof(void*)), register_creator_slot(NV_TENSORRT_MAJOR));
}

class Creator : public PluginTest {
 protected:
    /// Expects no plugin, and one line that names the plugin and `reason`.
    void expect_refused(const PluginField& field, const std::string& reason) {
        for (const TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) {
            testing::internal::CaptureStderr();
            const PluginPointer plugin = create(op(), {field}, phase);
            const std::string log = testing::internal::GetCapturedStderr();
            EXPECT_EQ(plugin, nullptr) << reason;
            EXPECT_EQ(log.find(std::string("[megalodon] ") + op().name + ": "), 0u) << log;
            EXPECT_NE(log.find(reason), std::string::npos) << log;
        }
    }
    std::map<std::string, double> expected_fields(bool good) const {
        std::map<std::string, double> values;
        for (const Field& field : op().fields) {
            values[field.name] = static_cast<float>(good ? field.good : field.standard);
        }
        return values;
    }
};
MEGALODON_TEST_EVERY_PLUGIN(Creator);

TEST_P(Creator, NamesThePluginAsTheOperatorIsNamed) {
    const PluginPointer plugin = create_with_good_fields(op());
    ASSERT_NE(plugin, nullptr);
    EXPECT_STREQ(creator_of(op()).getPluginName(), op().name);
    EXPECT_STREQ(creator_of(op()).getPluginVersion(), "1");
    EXPECT_STREQ(creator_of(op()).getPluginNamespace(), "");
    EXPECT_STREQ(core_of(plugin).getPluginName(), op().name);
    EXPECT_STREQ(core_of(plugin).getPluginVersion(), "1");
    EXPECT_STREQ(core_of(plugin).getPluginNamespace(), "");
}

TEST_P(Creator, DeclaresItsFieldsWithTheTypesThatTheyHave) {
    const nvinfer1::PluginFieldCollection& declared = *creator_of(op()).getFieldNames();
    ASSERT_EQ(static_cast<size_t>(declared.nbFields), op().fields.size());
    for (size_t i = 0; i < op().fields.size(); ++i) {
        EXPECT_STREQ(declared.fields[i].name, op().fields[i].name);
        EXPECT_EQ(declared.fields[i].type, FieldValue(op().fields[i], 0).get().type);
        EXPECT_EQ(declared.fields[i].length, 1);
    }
}

TEST_P(Creator, AMissingFieldHasItsStandardValueIfThereIsOne) {
    for (const Field& field : op().fields) {
        if (!std::isnan(field.standard)) continue;
        testing::internal::CaptureStderr();
        EXPECT_EQ(create(op(), {}), nullptr);
        EXPECT_NE(testing::internal::GetCapturedStderr().find(field.name), std::string::npos);
        return;
    }
    EXPECT_EQ(serialized_fields(create(op(), {})), expected_fields(false));
    const PluginPointer without_collection(creator_of(op()).createPlugin("layer", nullptr, TensorRTPhase::kBUILD));
    ASSERT_NE(without_collection, nullptr);
    EXPECT_EQ(serialized_fields(without_collection), expected_fields(false));
}

TEST_P(Creator, FieldsSurviveCopiesAndSerialisation) {
    const PluginPointer plugin = create_with_good_fields(op());
    ASSERT_NE(plugin, nullptr);
    const PluginPointer clone(plugin->clone());
    const PluginPointer attached(runtime_of(clone).attachToContext(nullptr));
    const nvinfer1::PluginFieldCollection* fields = runtime_of(attached).getFieldsToSerialize();
    const PluginPointer restored(creator_of(op()).createPlugin("layer", fields, TensorRTPhase::kRUNTIME));
    ASSERT_NE(restored, nullptr);
    EXPECT_EQ(serialized_fields(restored), expected_fields(true));
    EXPECT_EQ(serialized_fields(plugin), expected_fields(true));
    EXPECT_EQ(serialized_fields(plugin), serialized_fields(plugin));
}

TEST_P(Creator, ACopyOutlivesItsOriginal) {
    PluginPointer plugin = create_with_good_fields(op());
    static_cast<void>(serialized_fields(plugin));
    const PluginPointer clone(plugin->clone());
    plugin.reset();
    EXPECT_EQ(serialized_fields(clone), expected_fields(true));
}

TEST_P(Creator, RefusesFieldsThatItDoesNotHave) {
    const float value = 1.0f;
    expect_refused({"no_such_field", &value, PluginFieldType::kFLOAT32, 1}, "unknown field no_such_field");
    expect_refused({nullptr, &value, PluginFieldType::kFLOAT32, 1}, "unknown field (no name)");
    expect_refused({"", &value, PluginFieldType::kFLOAT32, 1}, "unknown field");
}

TEST_P(Creator, RefusesFieldsOfAnotherTypeOrLength) {
    const double wide[2] = {0.25, 0.25};
    for (const Field& field : op().fields) {
        const PluginField good = FieldValue(field, field.good).get();
        for (int type = 0; type <= static_cast<int>(PluginFieldType::kINT4); ++type) {
            if (static_cast<PluginFieldType>(type) == good.type) continue;
            expect_refused({field.name, wide, static_cast<PluginFieldType>(type), 1}, field.name);
        }
        for (const int32_t length : {-1, 0, 2, INT32_MAX}) {
            expect_refused({field.name, wide, good.type, length}, field.name);
        }
        expect_refused({field.name, nullptr, good.type, 1}, field.name);
    }
}

TEST_P(Creator, RefusesImpossibleValues) {
    for (const Field& field : op().fields) {
        for (const double value : field.bad) {
            const FieldValue bad(field, value);
            expect_refused(bad.get(), field.name);
        }
    }
}

}  // namespace
}  // namespace megalodon::tests
