// Types, shapes, formats and calls of every plugin: what is right is taken, what is wrong gives an error status.
#include <climits>
#include <vector>

#include "megalodon/megalodon.h"
#include "tests/plugin_test.h"

namespace megalodon::tests {
namespace {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr DataType kActivations[] = {DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
constexpr DataType kTypes[] = {DataType::kFLOAT, DataType::kHALF, DataType::kINT8, DataType::kINT32, DataType::kBOOL,
                               DataType::kUINT8, DataType::kFP8,  DataType::kBF16, DataType::kINT64, DataType::kINT4};

class Calls : public PluginTest {
 protected:
    void SetUp() override {
        plugin_ = create_with_good_fields(op());
        ASSERT_NE(plugin_, nullptr);
    }
    bool supports(int32_t position, const std::vector<DynamicPluginTensorDesc>& descs) {
        return build_of(plugin_).supportsFormatCombination(position, descs.data(), num_inputs(), num_outputs());
    }
    bool accepts(const std::vector<PluginTensorDesc>& descs, int32_t inputs, int32_t outputs) {
        return runtime_of(plugin_).onShapeChange(descs.data(), inputs, descs.data() + num_inputs(), outputs) == 0;
    }
    bool configures(const std::vector<DynamicPluginTensorDesc>& descs, int32_t inputs, int32_t outputs) {
        return build_of(plugin_).configurePlugin(descs.data(), inputs, descs.data() + num_inputs(), outputs) == 0;
    }
    bool is_accepted_everywhere(const std::vector<PluginTensorDesc>& descs) {
        const bool accepted = accepts(descs, num_inputs(), num_outputs());
        EXPECT_EQ(configures(describe_dynamic(descs), num_inputs(), num_outputs()), accepted);
        return accepted;
    }
    /// How often a letter stands in the shapes of the inputs.
    static int num_places(char letter) {
        int count = 0;
        for (const Tensor& tensor : op().inputs) {
            for (const char* other = tensor.dims; *other != '\0'; ++other) {
                count += *other == letter;
            }
        }
        return count;
    }
    static int32_t first_of_kind(int32_t input) {
        int32_t first = 0;
        while (op().inputs[first].kind != op().inputs[input].kind) {
            ++first;
        }
        return first;
    }
    /// Whether the first tensor of a kind may be of that type; the others must then be as well.
    static bool is_possible(Kind kind, DataType type) {
        const bool has_8_bits = kind == Kind::kInt8 || kind == Kind::kFloat8;
        if (has_8_bits) return type == DataType::kINT8 || type == DataType::kFP8;
        const bool is_activation = type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
        return kind == Kind::kActivation && is_activation;
    }
    const std::vector<std::pair<int32_t, int32_t>> wrong_counts_ = {{num_inputs() - 1, num_outputs()},
                                                                    {num_inputs() + 1, num_outputs()},
                                                                    {num_inputs(), num_outputs() - 1},
                                                                    {num_inputs(), num_outputs() + 1},
                                                                    {0, num_outputs()},
                                                                    {-1, num_outputs()},
                                                                    {num_inputs(), 0},
                                                                    {num_inputs(), -1}};
    PluginPointer plugin_;
};
MEGALODON_TEST_EVERY_PLUGIN(Calls);

TEST_P(Calls, OutputTypesFollowTheActivations) {
    ASSERT_EQ(build_of(plugin_).getNbOutputs(), num_outputs());
    for (const DataType activation : kActivations) {
        std::vector<DataType> inputs, outputs(op().outputs.size(), DataType::kBOOL);
        for (const Tensor& tensor : op().inputs) {
            inputs.push_back(type_of(tensor.kind, activation));
        }
        ASSERT_EQ(build_of(plugin_).getOutputDataTypes(outputs.data(), num_outputs(), inputs.data(), num_inputs()), 0);
        for (size_t i = 0; i < outputs.size(); ++i) {
            EXPECT_EQ(outputs[i], type_of(op().outputs[i].kind, activation)) << "output " << i;
        }
        for (const auto& [some_inputs, some_outputs] : wrong_counts_) {
            EXPECT_NE(build_of(plugin_).getOutputDataTypes(outputs.data(), some_outputs, inputs.data(), some_inputs),
                      0);
        }
    }
}

/// Each size of an output is one of the inputs' sizes with the same letter.
TEST_P(Calls, OutputShapesFollowTheInputs) {
    struct Expression final : nvinfer1::IDimensionExpr {};
    struct Builder final : nvinfer1::IExprBuilder {};
    Builder builder;
    std::vector<std::vector<Expression>> expressions;
    std::multimap<const nvinfer1::IDimensionExpr*, char> letters;
    std::vector<nvinfer1::DimsExprs> inputs(op().inputs.size()), outputs(op().outputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
        inputs[i].nbDims = static_cast<int32_t>(std::strlen(op().inputs[i].dims));
        expressions.emplace_back(inputs[i].nbDims);
        for (int32_t d = 0; d < inputs[i].nbDims; ++d) {
            inputs[i].d[d] = &expressions[i][d];
            letters.emplace(inputs[i].d[d], op().inputs[i].dims[d]);
        }
    }
    const auto get_shapes = [&](int32_t some_inputs, int32_t some_outputs) {
        return build_of(plugin_).getOutputShapes(inputs.data(), some_inputs, nullptr, 0, outputs.data(), some_outputs,
                                                 builder);
    };
    for (const auto& [some_inputs, some_outputs] : wrong_counts_) {
        EXPECT_NE(get_shapes(some_inputs, some_outputs), 0);
    }
    ASSERT_EQ(get_shapes(num_inputs(), num_outputs()), 0);
    for (size_t i = 0; i < outputs.size(); ++i) {
        ASSERT_EQ(static_cast<size_t>(outputs[i].nbDims), std::strlen(op().outputs[i].dims)) << "output " << i;
        for (int32_t d = 0; d < outputs[i].nbDims; ++d) {
            const auto found = letters.find(outputs[i].d[d]);
            ASSERT_NE(found, letters.end());
            EXPECT_EQ(found->second, op().outputs[i].dims[d]) << "output " << i << ", dimension " << d;
        }
    }
}

TEST_P(Calls, EveryTensorHasItsOwnTypeAndTheLinearFormatAlone) {
    for (const DataType activation : kActivations) {
        const auto good = describe_dynamic(describe(op(), activation));
        for (int32_t position = 0; position < static_cast<int32_t>(good.size()); ++position) {
            for (const DataType type : kTypes) {
                auto descs = good;
                descs[position].desc.type = type;
                const bool is_first_of_kind = position < num_inputs() && first_of_kind(position) == position;
                const bool is_free = is_first_of_kind && is_possible(op().inputs[position].kind, type);
                EXPECT_EQ(supports(position, descs), is_free || type == good[position].desc.type)
                    << "tensor " << position << ", type " << static_cast<int>(type);
            }
            auto other = good;
            other[position].desc.format = nvinfer1::TensorFormat::kCHW4;
            EXPECT_FALSE(supports(position, other));
        }
        for (const int32_t position : {-1, num_inputs() + num_outputs(), INT_MAX}) {
            EXPECT_FALSE(supports(position, good));
        }
        for (const auto& [inputs, outputs] : wrong_counts_) {
            EXPECT_FALSE(build_of(plugin_).supportsFormatCombination(0, good.data(), inputs, outputs));
        }
    }
}

TEST_P(Calls, ShapesThatContradictEachOtherAreRefused) {
    const auto good = describe(op());
    EXPECT_TRUE(is_accepted_everywhere(good));
    for (int32_t i = 0; i < num_inputs(); ++i) {
        for (const int32_t num_dims : {good[i].dims.nbDims - 1, good[i].dims.nbDims + 1, 0, -1}) {
            auto bad = good;
            bad[i].dims.nbDims = num_dims;
            EXPECT_FALSE(is_accepted_everywhere(bad)) << "input " << i << " with " << num_dims << " dimensions";
        }
        for (int32_t d = 0; d < good[i].dims.nbDims; ++d) {
            const char letter = op().inputs[i].dims[d];
            if (num_places(letter) == 1 && letter > '9') continue;  // any size is right
            auto bad = good;
            bad[i].dims.d[d] += 1;
            EXPECT_FALSE(is_accepted_everywhere(bad)) << "input " << i << ", size " << letter;
        }
    }
}

TEST_P(Calls, WrongNumbersOfTensorsAreRefused) {
    const auto descs = describe(op());
    for (const auto& [inputs, outputs] : wrong_counts_) {
        EXPECT_FALSE(accepts(descs, inputs, outputs));
        EXPECT_FALSE(configures(describe_dynamic(descs), inputs, outputs));
    }
}

/// What TensorRT grants for a profile's largest call must be enough for every smaller one.
TEST_P(Calls, TheWorkspaceGrowsWithTheCall) {
    const auto bytes_of = [&](const std::vector<PluginTensorDesc>& descs) {
        const auto dynamic = describe_dynamic(descs);
        return build_of(plugin_).getWorkspaceSize(dynamic.data(), num_inputs(), dynamic.data() + num_inputs(),
                                                  num_outputs());
    };
    size_t previous = 0;
    for (int64_t T = 1; T < 600; ++T) {
        Operator longer = op();
        longer.sizes['T'] = T;
        const size_t bytes = bytes_of(describe(longer));
        EXPECT_GE(bytes, previous) << "T = " << T;
        previous = bytes;
    }
    auto bad = describe(op());
    bad[0].dims.nbDims = -1;
    EXPECT_EQ(bytes_of(bad), 0u);
}

TEST_P(Calls, EnqueueIsTheCallOfTheCInterface) {
    if (!library().runs_on_host) GTEST_SKIP() << "needs a GPU";
    HostTensors through_plugin(op()), direct(op());
    ASSERT_EQ(enqueue(plugin_, op(), through_plugin), 0);
    direct.give_workspace(through_plugin.call.workspace_bytes);
    ASSERT_EQ(op().call(library().handle, op(), direct.call), MGD_OK);
    EXPECT_TRUE(through_plugin.equals(direct));
    EXPECT_TRUE(through_plugin.outputs_are_finite());
}

TEST_P(Calls, EnqueueOfARestoredPluginComputesTheSame) {
    if (!library().runs_on_host) GTEST_SKIP() << "needs a GPU";
    const PluginPointer restored(creator_of(op()).createPlugin("layer", runtime_of(plugin_).getFieldsToSerialize(),
                                                               nvinfer1::TensorRTPhase::kRUNTIME));
    const PluginPointer attached(runtime_of(restored).attachToContext(nullptr));
    HostTensors one(op()), other(op());
    ASSERT_EQ(enqueue(plugin_, op(), one), 0);
    ASSERT_EQ(enqueue(attached, op(), other), 0);
    EXPECT_TRUE(one.equals(other));
}

/// None of these reaches a kernel, so the real library is asked as well.
TEST_P(Calls, EnqueueRefusesWhatNoCallCanHave) {
    const auto status_of = [&](std::vector<PluginTensorDesc> descs, HostTensors& tensors) {
        return runtime_of(plugin_).enqueue(descs.data(), descs.data() + num_inputs(), tensors.call.inputs.data(),
                                           tensors.call.outputs.data(), tensors.call.workspace, nullptr);
    };
    const auto good = describe(op());
    for (size_t i = 0; i < op().inputs.size(); ++i) {
        HostTensors tensors(op());
        tensors.call.inputs[i] = nullptr;
        EXPECT_NE(enqueue(plugin_, op(), tensors), 0) << "input " << i;
    }
    for (size_t i = 0; i < op().outputs.size(); ++i) {
        HostTensors tensors(op());
        tensors.call.outputs[i] = nullptr;
        EXPECT_NE(enqueue(plugin_, op(), tensors), 0) << "output " << i;
    }
    HostTensors tensors(op());
    auto bad = good;
    bad[0].type = DataType::kINT32;
    EXPECT_NE(status_of(bad, tensors), 0);
    bad = good;
    bad[0].dims.nbDims -= 1;
    EXPECT_NE(status_of(bad, tensors), 0);
    Operator negative = op();
    negative.sizes['T'] = -1;
    EXPECT_NE(status_of(describe(negative), tensors), 0);
}

}  // namespace
}  // namespace megalodon::tests
