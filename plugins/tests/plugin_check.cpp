// Drives the TensorRT plugins of a library without TensorRT: creators, fields, types, shapes, formats, serialisation,
// and, where the library is the emulated one, enqueue() on host memory. Prints each failure; exit code 1 if there was
// one.
//
//     plugin_check LIBRARY [--enqueue]
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "megalodon/megalodon.h"
#include "megalodon/state_layout.h"
#include "register/slots.h"

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using Plugin = std::unique_ptr<nvinfer1::IPluginV3>;

int num_failures = 0;

void expect(bool holds, const char* what, int line) {
    if (holds) return;
    std::printf("plugin_check.cpp:%d: %s\n", line, what);
    ++num_failures;
}

#define EXPECT(condition) expect((condition), #condition, __LINE__)

constexpr int64_t kB = 2, kT = 17, kD = 12, kN = 3, kG = 4, kPowers = 5;  // all different
constexpr int kNumOutputs = 2;

struct Library {
    void* handle;
    template <typename Function>
    Function* find(const char* name) const {
        auto* function = reinterpret_cast<Function*>(dlsym(handle, name));
        if (function == nullptr) {
            std::printf("%s is not exported\n", name);
            std::exit(1);
        }
        return function;
    }
};

/// An operator's inputs: their types (activations as float) and shapes.
struct Operator {
    const char* name;
    std::vector<DataType> types;
    std::vector<std::vector<int64_t>> shapes;
    int num_inputs() const { return static_cast<int>(types.size()); }
};

Operator complex_ema() {
    const auto f = DataType::kFLOAT;
    return {megalodon::kComplexEma,
            {f, f, DataType::kINT64, f, f, f, f},
            {{kB, kT, kD}, {kB, kD, kN, 2}, {kB}, {kD, kN}, {kPowers, kD, kN, 2}, {kD, kN, 2}, {kD}}};
}

Operator timestep_norm() {
    const auto f = DataType::kFLOAT;
    return {megalodon::kTimestepNorm, {f, f, DataType::kINT64, f, f}, {{kB, kT, kD}, {kB, kG, 4}, {kB}, {kD}, {kD}}};
}

Dims dims_of(const std::vector<int64_t>& shape) {
    Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

/// Inputs, then outputs, as TensorRT describes them for a call.
std::vector<PluginTensorDesc> describe(const Operator& op, DataType activation) {
    std::vector<PluginTensorDesc> descs;
    for (int i = 0; i < op.num_inputs() + kNumOutputs; ++i) {
        const int like = i < op.num_inputs() ? i : i - op.num_inputs();
        descs.push_back(
            {dims_of(op.shapes[like]), like == 0 ? activation : op.types[like], nvinfer1::TensorFormat::kLINEAR, 1.0f});
    }
    return descs;
}

std::vector<DynamicPluginTensorDesc> describe_dynamic(const std::vector<PluginTensorDesc>& descs) {
    std::vector<DynamicPluginTensorDesc> dynamic;
    for (const PluginTensorDesc& desc : descs) {
        dynamic.push_back({desc, desc.dims, desc.dims, desc.dims});
    }
    return dynamic;
}

Plugin create(nvinfer1::IPluginCreatorV3One& creator, const std::vector<PluginField>& fields,
              nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD) {
    const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    return Plugin(creator.createPlugin("layer", &collection, phase));
}

nvinfer1::IPluginV3OneBuild& build_of(const Plugin& plugin) {
    return *static_cast<nvinfer1::IPluginV3OneBuild*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
}

nvinfer1::IPluginV3OneRuntime& runtime_of(const Plugin& plugin) {
    return *static_cast<nvinfer1::IPluginV3OneRuntime*>(
        plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}

float serialized_epsilon(const Plugin& plugin) {
    const nvinfer1::PluginFieldCollection* fields = runtime_of(plugin).getFieldsToSerialize();
    EXPECT(fields->nbFields == 1);
    const PluginField& field = fields->fields[0];
    EXPECT(std::string(field.name) == "epsilon");
    EXPECT(field.type == PluginFieldType::kFLOAT32 && field.length == 1);
    return *static_cast<const float*>(field.data);
}

void check_creator(nvinfer1::IPluginCreatorV3One& creator, const Operator& op) {
    EXPECT(std::string(creator.getPluginName()) == op.name);
    EXPECT(std::string(creator.getPluginVersion()) == "1");
    EXPECT(std::string(creator.getPluginNamespace()).empty());
    const Plugin plugin = create(creator, {});
    EXPECT(plugin != nullptr);
    const auto* core =
        static_cast<nvinfer1::IPluginV3OneCore*>(plugin->getCapabilityInterface(nvinfer1::PluginCapabilityType::kCORE));
    EXPECT(std::string(core->getPluginName()) == op.name);
    EXPECT(build_of(plugin).getNbOutputs() == kNumOutputs);
    EXPECT(Plugin(creator.createPlugin("layer", nullptr, nvinfer1::TensorRTPhase::kBUILD)) != nullptr);
    const float value = 1.0f;
    EXPECT(create(creator, {{"no_such_field", &value, PluginFieldType::kFLOAT32, 1}}) == nullptr);
    EXPECT(create(creator, {{nullptr, &value, PluginFieldType::kFLOAT32, 1}}) == nullptr);
}

void check_epsilon(nvinfer1::IPluginCreatorV3One& creator) {
    EXPECT(creator.getFieldNames()->nbFields == 1);
    EXPECT(creator.getFieldNames()->fields[0].type == PluginFieldType::kFLOAT32);
    EXPECT(serialized_epsilon(create(creator, {})) == 1e-5f);

    const float values[] = {0.25f, 1.0f};
    const double wide = 0.25;
    const int32_t integer = 1;
    EXPECT(create(creator, {{"epsilon", &wide, PluginFieldType::kFLOAT64, 1}}) == nullptr);
    EXPECT(create(creator, {{"epsilon", &integer, PluginFieldType::kINT32, 1}}) == nullptr);
    EXPECT(create(creator, {{"epsilon", values, PluginFieldType::kFLOAT32, 2}}) == nullptr);
    EXPECT(create(creator, {{"epsilon", values, PluginFieldType::kFLOAT32, 0}}) == nullptr);
    EXPECT(create(creator, {{"epsilon", nullptr, PluginFieldType::kFLOAT32, 1}}) == nullptr);
    const float infinity = std::numeric_limits<float>::infinity();
    for (const float bad : {0.0f, -1e-5f, infinity, std::nanf("")}) {
        EXPECT(create(creator, {{"epsilon", &bad, PluginFieldType::kFLOAT32, 1}}) == nullptr);
    }

    const Plugin plugin = create(creator, {{"epsilon", values, PluginFieldType::kFLOAT32, 1}});
    const Plugin clone(plugin->clone());
    const Plugin attached(runtime_of(clone).attachToContext(nullptr));
    const nvinfer1::PluginFieldCollection* fields = runtime_of(attached).getFieldsToSerialize();
    const Plugin restored(creator.createPlugin("layer", fields, nvinfer1::TensorRTPhase::kRUNTIME));
    EXPECT(serialized_epsilon(restored) == 0.25f);
    EXPECT(serialized_epsilon(plugin) == 0.25f);
}

void check_types_and_shapes(const Plugin& plugin, const Operator& op) {
    for (const DataType activation : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        std::vector<DataType> types = op.types;
        types[0] = activation;
        DataType outputs[kNumOutputs];
        EXPECT(build_of(plugin).getOutputDataTypes(outputs, kNumOutputs, types.data(), op.num_inputs()) == 0);
        EXPECT(outputs[0] == activation && outputs[1] == DataType::kFLOAT);
        EXPECT(build_of(plugin).getOutputDataTypes(outputs, kNumOutputs, types.data(), op.num_inputs() - 1) != 0);
    }
    struct Expression final : nvinfer1::IDimensionExpr {};
    struct Builder final : nvinfer1::IExprBuilder {};
    Builder builder;
    Expression expressions[8][4];
    std::vector<nvinfer1::DimsExprs> inputs(op.num_inputs());
    for (int i = 0; i < op.num_inputs(); ++i) {
        inputs[i].nbDims = static_cast<int32_t>(op.shapes[i].size());
        for (int d = 0; d < inputs[i].nbDims; ++d) {
            inputs[i].d[d] = &expressions[i][d];
        }
    }
    nvinfer1::DimsExprs outputs[kNumOutputs];
    EXPECT(build_of(plugin).getOutputShapes(inputs.data(), op.num_inputs(), nullptr, 0, outputs, kNumOutputs,
                                            builder) == 0);
    for (int i = 0; i < kNumOutputs; ++i) {
        EXPECT(outputs[i].nbDims == inputs[i].nbDims);
        for (int d = 0; d < inputs[i].nbDims; ++d) {
            EXPECT(outputs[i].d[d] == inputs[i].d[d]);
        }
    }
}

/// Every tensor at its own type passes and at any other fails; only the linear format passes.
void check_formats(const Plugin& plugin, const Operator& op) {
    const auto supports = [&](int position, const std::vector<DynamicPluginTensorDesc>& descs) {
        return build_of(plugin).supportsFormatCombination(position, descs.data(), op.num_inputs(), kNumOutputs);
    };
    for (const DataType activation : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        const auto good = describe_dynamic(describe(op, activation));
        for (int position = 0; position < static_cast<int>(good.size()); ++position) {
            EXPECT(supports(position, good));
            auto bad = good;
            bad[position].desc.format = nvinfer1::TensorFormat::kCHW4;
            EXPECT(!supports(position, bad));
            bad = good;
            bad[position].desc.type = DataType::kINT32;
            EXPECT(!supports(position, bad));
            bad[position].desc.type = activation == DataType::kHALF ? DataType::kBF16 : DataType::kHALF;
            EXPECT(supports(position, bad) == (position == 0));  // x may be any activation type; y must be as x is
        }
    }
}

void check_shape_change(const Plugin& plugin, const Operator& op) {
    const auto accepts = [&](std::vector<PluginTensorDesc> descs) {
        return runtime_of(plugin).onShapeChange(descs.data(), op.num_inputs(), descs.data() + op.num_inputs(),
                                                kNumOutputs) == 0;
    };
    const auto good = describe(op, DataType::kFLOAT);
    EXPECT(accepts(good));
    for (int i = 0; i < op.num_inputs(); ++i) {
        auto bad = good;
        bad[i].dims.nbDims -= 1;
        EXPECT(!accepts(bad));
        bad = good;
        bad[i].dims.d[bad[i].dims.nbDims - 1] += 1;  // D, B, a number of parts, or N: known from other tensors as well
        EXPECT(!accepts(bad));
    }
    auto dynamic = describe_dynamic(good);
    const auto configure = [&](int num_inputs) {
        return build_of(plugin).configurePlugin(dynamic.data(), num_inputs, dynamic.data() + op.num_inputs(),
                                                kNumOutputs);
    };
    EXPECT(configure(op.num_inputs()) == 0);
    EXPECT(configure(op.num_inputs() - 1) != 0);
    dynamic[1].max.d[0] += 1;
    EXPECT(configure(op.num_inputs()) != 0);
}

/// Host tensors of a call, filled with different finite numbers; the outputs with NaN.
struct Tensors {
    std::vector<std::vector<float>> values;
    std::vector<int64_t> position{0, 9};
    std::vector<const void*> inputs;
    std::vector<void*> outputs;

    explicit Tensors(const Operator& op) {
        for (int i = 0; i < op.num_inputs() + kNumOutputs; ++i) {
            const bool is_output = i >= op.num_inputs();
            int64_t size = 1;
            for (const int64_t dim : op.shapes[is_output ? i - op.num_inputs() : i])
                size *= dim;
            values.emplace_back(size, std::nanf(""));
            for (int64_t k = 0; !is_output && k < size; ++k) {
                values[i][k] = 0.5f + 0.4f * std::sin(static_cast<float>(k * (i + 2)));
            }
        }
        for (int i = 0; i < op.num_inputs(); ++i) {
            inputs.push_back(op.types[i] == DataType::kINT64 ? static_cast<const void*>(position.data())
                                                             : values[i].data());
        }
        for (int i = 0; i < kNumOutputs; ++i)
            outputs.push_back(values[op.num_inputs() + i].data());
    }

    bool equals(const Tensors& other) const {
        for (size_t i = 0; i < values.size(); ++i) {
            if (std::memcmp(values[i].data(), other.values[i].data(), values[i].size() * sizeof(float)) != 0)
                return false;
        }
        return true;
    }

    const float* input(int i) const { return values[i].data(); }
};

bool enqueue(const Plugin& plugin, const Operator& op, Tensors& tensors) {
    const auto descs = describe(op, DataType::kFLOAT);
    const auto dynamic = describe_dynamic(descs);
    const size_t bytes = build_of(plugin).getWorkspaceSize(dynamic.data(), op.num_inputs(),
                                                           dynamic.data() + op.num_inputs(), kNumOutputs);
    std::vector<double> workspace(bytes / sizeof(double) + 2, std::nan(""));
    return runtime_of(plugin).enqueue(descs.data(), descs.data() + op.num_inputs(), tensors.inputs.data(),
                                      tensors.outputs.data(), workspace.data(), nullptr) == 0;
}

/// The plugin must hand every tensor to the right argument: same bits as a direct call.
void check_enqueue_complex_ema(const Library& library, const Plugin& plugin) {
    Tensors through_plugin(complex_ema()), direct(complex_ema());
    EXPECT(enqueue(plugin, complex_ema(), through_plugin));
    const int status = library.find<decltype(mgd_complex_ema)>("mgd_complex_ema")(
        MGD_FLOAT32, kB, kT, kD, kN, direct.input(0), direct.input(1), direct.position.data(), direct.input(3),
        direct.input(4), direct.input(5), direct.input(6), direct.outputs[0], static_cast<float*>(direct.outputs[1]),
        nullptr);
    EXPECT(status == MGD_OK);
    EXPECT(through_plugin.equals(direct));
    Tensors without_y(complex_ema());
    without_y.outputs[0] = nullptr;
    EXPECT(!enqueue(plugin, complex_ema(), without_y));
}

void check_enqueue_timestep_norm(const Library& library, nvinfer1::IPluginCreatorV3One& creator) {
    const float epsilon = 0.25f;
    const Plugin plugin = create(creator, {{"epsilon", &epsilon, PluginFieldType::kFLOAT32, 1}});
    Tensors through_plugin(timestep_norm()), direct(timestep_norm());
    EXPECT(enqueue(plugin, timestep_norm(), through_plugin));
    const size_t bytes =
        library.find<decltype(mgd_timestep_norm_workspace_bytes)>("mgd_timestep_norm_workspace_bytes")(kB, kT, kG);
    EXPECT(bytes > 0);  // so that the workspace's way through the plugin is tried
    std::vector<double> workspace(bytes / sizeof(double) + 1);
    const int status = library.find<decltype(mgd_timestep_norm)>("mgd_timestep_norm")(
        MGD_FLOAT32, kB, kT, kD, kG, direct.input(0), direct.input(1), direct.position.data(), direct.input(3),
        direct.input(4), epsilon, direct.outputs[0], static_cast<float*>(direct.outputs[1]), workspace.data(), bytes,
        nullptr);
    EXPECT(status == MGD_OK);
    EXPECT(through_plugin.equals(direct));
}

/// In the Itanium C++ ABI on x86, a pointer to a virtual member function holds 1 + its offset in the table of
/// functions.
void check_register_slot() {
#if defined(__x86_64__)
    bool (nvinfer1::IPluginRegistry::*member)(nvinfer1::IPluginCreatorInterface&, const char*) =
        &nvinfer1::IPluginRegistry::registerCreator;
    std::ptrdiff_t offset = 0;
    std::memcpy(&offset, &member, sizeof(offset));
    EXPECT((offset - 1) / static_cast<std::ptrdiff_t>(sizeof(void*)) ==
           megalodon::register_creator_slot(NV_TENSORRT_MAJOR));
#endif
}

}  // namespace

int main(int argc, char** argv) {
    const Library library{argc > 1 ? dlopen(argv[1], RTLD_NOW) : nullptr};
    if (library.handle == nullptr) {
        std::printf("usage: plugin_check LIBRARY [--enqueue] (%s)\n", argc > 1 ? dlerror() : "no library");
        return 2;
    }
    library.find<void(void*)>("setLoggerFinder")(nullptr);
    int32_t count = 0;
    auto* const* creators = library.find<nvinfer1::IPluginCreatorInterface* const*(int32_t&)>("getCreators")(count);
    EXPECT(count == 2);
    auto& ema_creator = static_cast<nvinfer1::IPluginCreatorV3One&>(*creators[0]);
    auto& norm_creator = static_cast<nvinfer1::IPluginCreatorV3One&>(*creators[1]);
    EXPECT(ema_creator.getFieldNames()->nbFields == 0);
    check_epsilon(norm_creator);
    check_register_slot();
    for (auto& [creator, op] : {std::pair{&ema_creator, complex_ema()}, {&norm_creator, timestep_norm()}}) {
        check_creator(*creator, op);
        const Plugin plugin = create(*creator, {});
        check_types_and_shapes(plugin, op);
        check_formats(plugin, op);
        check_shape_change(plugin, op);
    }
    if (argc > 2 && std::string(argv[2]) == "--enqueue") {
        check_enqueue_complex_ema(library, create(ema_creator, {}));
        check_enqueue_timestep_norm(library, norm_creator);
    }
    std::printf("%d failures\n", num_failures);
    return num_failures == 0 ? 0 : 1;
}
