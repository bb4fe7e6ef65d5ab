#include "tests/harness.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace megalodon::tests {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginCreatorV3One;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

Library& library() {
    static Library instance;
    return instance;
}

std::vector<IPluginCreatorV3One*> creators() {
    using GetCreators = IPluginCreatorInterface* const*(int32_t&);
    auto* get_creators = reinterpret_cast<GetCreators*>(dlsym(library().handle, "getCreators"));
    int32_t count = 0;
    IPluginCreatorInterface* const* found = get_creators(count);
    std::vector<IPluginCreatorV3One*> all;
    for (int32_t i = 0; i < count; ++i) {
        all.push_back(static_cast<IPluginCreatorV3One*>(found[i]));
    }
    return all;
}

IPluginCreatorV3One& creator_of(const Operator& op) {
    for (IPluginCreatorV3One* creator : creators()) {
        if (std::strcmp(creator->getPluginName(), op.name) == 0) return *creator;
    }
    throw std::runtime_error(std::string("getCreators() does not list ") + op.name);
}

PluginPointer create(const Operator& op, const std::vector<PluginField>& fields, nvinfer1::TensorRTPhase phase) {
    const nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
    return PluginPointer(creator_of(op).createPlugin("layer", &collection, phase));
}

PluginPointer create_with_good_fields(const Operator& op) {
    std::vector<FieldValue> values;
    for (const Field& field : op.fields) {
        values.emplace_back(field, field.good);
    }
    std::vector<PluginField> fields;
    std::transform(values.begin(), values.end(), std::back_inserter(fields), [](auto& value) { return value.get(); });
    return create(op, fields);
}

nvinfer1::IPluginV3OneCore& core_of(const PluginPointer& plugin) {
    return *static_cast<nvinfer1::IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
}

nvinfer1::IPluginV3OneBuild& build_of(const PluginPointer& plugin) {
    return *static_cast<nvinfer1::IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

nvinfer1::IPluginV3OneRuntime& runtime_of(const PluginPointer& plugin) {
    return *static_cast<nvinfer1::IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

std::map<std::string, double> serialized_fields(const PluginPointer& plugin) {
    const nvinfer1::PluginFieldCollection& fields = *runtime_of(plugin).getFieldsToSerialize();
    std::map<std::string, double> values;
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        const PluginField& field = fields.fields[i];
        if (field.length != 1) throw std::runtime_error(std::string(field.name) + " is no single value");
        const bool is_float = field.type == PluginFieldType::kFLOAT32;
        values[field.name] =
            is_float ? *static_cast<const float*>(field.data) : *static_cast<const int32_t*>(field.data);
    }
    return values;
}

DataType type_of(Kind kind, DataType activation) {
    switch (kind) {
        case Kind::kActivation:
            return activation;
        case Kind::kInt64:
            return DataType::kINT64;
        case Kind::kInt8:
            return DataType::kINT8;
        case Kind::kFloat8:
            return DataType::kFP8;
        default:
            return DataType::kFLOAT;
    }
}

std::vector<PluginTensorDesc> describe(const Operator& op, DataType activation) {
    std::vector<PluginTensorDesc> descs;
    for (const auto* tensors : {&op.inputs, &op.outputs}) {
        for (const Tensor& tensor : *tensors) {
            nvinfer1::Dims dims{};
            for (const char* letter = tensor.dims; *letter != '\0'; ++letter) {
                dims.d[dims.nbDims++] = op.size(*letter);
            }
            descs.push_back({dims, type_of(tensor.kind, activation), nvinfer1::TensorFormat::kLINEAR, 1.0f});
        }
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

namespace {

template <typename Type>
void fill(std::vector<unsigned char>& memory, size_t count, Type (*value)(size_t index, size_t tensor), size_t tensor) {
    memory.resize(count * sizeof(Type));
    for (size_t i = 0; i < count; ++i) {
        const Type number = value(i, tensor);
        std::memcpy(memory.data() + i * sizeof(Type), &number, sizeof(Type));
    }
}

float finite_number(size_t index, size_t tensor) {
    return 0.5f + 0.4f * std::sin(static_cast<float>(index * (tensor + 2)));
}
float nan_number(size_t, size_t) {
    return std::numeric_limits<float>::quiet_NaN();
}
int8_t small_number(size_t index, size_t tensor) {
    return static_cast<int8_t>(index * (tensor + 2) % 0x70);  // also a finite number where it is taken for a float8
}
int64_t row_position(size_t index, size_t) {
    return static_cast<int64_t>(index * 9);  // the first row is fresh
}

}  // namespace

HostTensors::HostTensors(const Operator& op)
    : num_inputs_(op.inputs.size()), memory_(op.inputs.size() + op.outputs.size()) {
    for (size_t i = 0; i < memory_.size(); ++i) {
        const bool is_input = i < num_inputs_;
        const Tensor& tensor = is_input ? op.inputs[i] : op.outputs[i - num_inputs_];
        size_t count = 1;
        for (const char* letter = tensor.dims; *letter != '\0'; ++letter) {
            count *= static_cast<size_t>(op.size(*letter));
        }
        if (tensor.kind == Kind::kInt64) {
            fill<int64_t>(memory_[i], count, row_position, i);
        } else if (tensor.kind == Kind::kInt8 || tensor.kind == Kind::kFloat8) {
            fill<int8_t>(memory_[i], count, small_number, i);
        } else {
            fill<float>(memory_[i], count, is_input ? finite_number : nan_number, i);
        }
        if (is_input) {
            call.inputs.push_back(memory_[i].data());
        } else {
            call.outputs.push_back(memory_[i].data());
        }
    }
    for (const Field& field : op.fields) {
        call.fields[field.name] = field.good;
    }
}

void HostTensors::give_workspace(size_t num_bytes) {
    workspace_.assign(num_bytes, 0xff);  // NaN
    call.workspace = workspace_.data();
    call.workspace_bytes = num_bytes;
}

bool HostTensors::outputs_are_finite() const {
    for (size_t i = num_inputs_; i < memory_.size(); ++i) {
        for (size_t k = 0; k < memory_[i].size(); k += sizeof(float)) {
            float number = 0;
            std::memcpy(&number, memory_[i].data() + k, sizeof(float));
            if (!std::isfinite(number)) return false;
        }
    }
    return true;
}

int32_t enqueue(const PluginPointer& plugin, const Operator& op, HostTensors& tensors) {
    const auto descs = describe(op);
    const auto dynamic = describe_dynamic(descs);
    const auto num_inputs = static_cast<int32_t>(op.inputs.size()),
               num_outputs = static_cast<int32_t>(op.outputs.size());
    tensors.give_workspace(
        build_of(plugin).getWorkspaceSize(dynamic.data(), num_inputs, dynamic.data() + num_inputs, num_outputs));
    const PluginTensorDesc* outputs = descs.data() + num_inputs;
    if (runtime_of(plugin).onShapeChange(descs.data(), num_inputs, outputs, num_outputs) != 0) return -1;
    return runtime_of(plugin).enqueue(descs.data(), descs.data() + num_inputs, tensors.call.inputs.data(),
                                      tensors.call.outputs.data(), tensors.call.workspace, nullptr);
}

}  // namespace megalodon::tests
