// Drives the TensorRT plugins of a library without TensorRT: finds the creators, describes calls, holds host tensors.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/operators.h"

namespace megalodon::tests {

using PluginPointer = std::unique_ptr<nvinfer1::IPluginV3>;

/// The library under test, named on the command line.
struct Library {
    void* handle = nullptr;
    bool runs_on_host = false;  // the emulated one: enqueue() takes host memory
};
Library& library();

/// What getCreators() lists, in its order.
std::vector<nvinfer1::IPluginCreatorV3One*> creators();
nvinfer1::IPluginCreatorV3One& creator_of(const Operator& op);

/// A plugin from fields; their values outlive the call.
PluginPointer create(const Operator& op, const std::vector<nvinfer1::PluginField>& fields,
                     nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD);

/// A plugin whose every field has the value `good`.
PluginPointer create_with_good_fields(const Operator& op);

nvinfer1::IPluginV3OneCore& core_of(const PluginPointer& plugin);
nvinfer1::IPluginV3OneBuild& build_of(const PluginPointer& plugin);
nvinfer1::IPluginV3OneRuntime& runtime_of(const PluginPointer& plugin);

/// Field values by name, as getFieldsToSerialize() gives them.
std::map<std::string, double> serialized_fields(const PluginPointer& plugin);

nvinfer1::DataType type_of(Kind kind, nvinfer1::DataType activation);

/// Inputs, then outputs, as TensorRT describes them for a call.
std::vector<nvinfer1::PluginTensorDesc> describe(const Operator& op,
                                                 nvinfer1::DataType activation = nvinfer1::DataType::kFLOAT);
std::vector<nvinfer1::DynamicPluginTensorDesc> describe_dynamic(const std::vector<nvinfer1::PluginTensorDesc>& descs);

/// One field for a creator, as int32 or float32, pointing into itself.
class FieldValue {
 public:
    FieldValue(const Field& field, double value)
        : name_(field.name),
          type_(field.is_float ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32),
          float_(static_cast<float>(value)),
          integer_(field.is_float ? 0 : static_cast<int32_t>(value)) {}
    nvinfer1::PluginField get() const {
        const bool is_float = type_ == nvinfer1::PluginFieldType::kFLOAT32;
        return {name_, is_float ? static_cast<const void*>(&float_) : &integer_, type_, 1};
    }

 private:
    const char* name_;
    nvinfer1::PluginFieldType type_;
    float float_;
    int32_t integer_;
};

/// Host memory of a float32 call, each tensor exactly as large as it must be: inputs hold different finite numbers,
/// outputs and workspace NaN.
class HostTensors {
 public:
    explicit HostTensors(const Operator& op);
    void give_workspace(size_t num_bytes);
    bool outputs_are_finite() const;
    /// Whether outputs and inputs have the same bits.
    bool equals(const HostTensors& other) const { return memory_ == other.memory_; }

    HostCall call{};

 private:
    size_t num_inputs_;
    std::vector<std::vector<unsigned char>> memory_;  // of inputs, then outputs
    std::vector<unsigned char> workspace_;
};

/// Calls enqueue() as TensorRT does: after onShapeChange(), with the workspace that the plugin asks for; its status.
int32_t enqueue(const PluginPointer& plugin, const Operator& op, HostTensors& tensors);

}  // namespace megalodon::tests
