#include "common/plugin.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>

#include "c_api/checks.h"
#include "megalodon/megalodon.h"
#include "megalodon/state_layout.h"

namespace megalodon {

using nvinfer1::DataType;
using nvinfer1::PluginField;
using nvinfer1::PluginTensorDesc;

namespace {

constexpr int32_t kFailure = -1;

/// Runs `body`; what it throws becomes a logged line and `failure`, since nothing may leave a noexcept override.
template <typename Result, typename Body>
Result guarded(const char* plugin, Result failure, Body body) noexcept {
    try {
        return body();
    } catch (const std::exception& error) {
        log_error(plugin, error.what());
    } catch (...) {
        log_error(plugin, "unknown error");
    }
    return failure;
}

/// `first` is the type of the first input of that kind.
bool has_type(TensorKind kind, DataType type, DataType first) {
    switch (kind) {
        case TensorKind::kActivation:
            return is_activation(dtype_of(type)) && type == first;
        case TensorKind::kMemory:
            return (type == DataType::kFP8 || type == DataType::kINT8) && type == first;
        case TensorKind::kFloat32:
            return type == DataType::kFLOAT;
        case TensorKind::kInt64:
            return type == DataType::kINT64;
    }
    return false;
}

/// The largest shapes that a profile allows, as descriptions of a call.
std::vector<PluginTensorDesc> largest(const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t count) {
    std::vector<PluginTensorDesc> descs;
    for (int32_t i = 0; i < count; ++i) {
        descs.push_back(tensors[i].desc);
        descs.back().dims = tensors[i].max;
    }
    return descs;
}

}  // namespace

void log_error(const char* plugin, const char* message) noexcept {
    std::fprintf(stderr, "[megalodon] %s: %s\n", plugin, message);
}

int dtype_of(DataType type) noexcept {
    switch (type) {
        case DataType::kFLOAT:
            return MGD_FLOAT32;
        case DataType::kHALF:
            return MGD_FLOAT16;
        case DataType::kBF16:
            return MGD_BFLOAT16;
        case DataType::kFP8:
            return MGD_FLOAT8_E4M3;
        case DataType::kINT8:
            return MGD_INT8;
        default:
            return -1;
    }
}

Sizes::Sizes(const std::vector<InputSpec>& specs, const PluginTensorDesc* inputs, int32_t num_inputs) {
    if (num_inputs > static_cast<int32_t>(specs.size())) throw std::invalid_argument("has too many inputs");
    for (size_t i = 0; i < static_cast<size_t>(num_inputs); ++i) {
        const nvinfer1::Dims& dims = inputs[i].dims;
        if (dims.nbDims != static_cast<int32_t>(std::strlen(specs[i].dims))) {
            throw std::invalid_argument("input " + std::to_string(i) + " has " + std::to_string(dims.nbDims) +
                                        " dimensions, expected [" + specs[i].dims + "]");
        }
        for (int32_t d = 0; d < dims.nbDims; ++d) {
            bind(specs[i].dims[d], dims.d[d], i);
        }
    }
}

void Sizes::bind(char letter, int64_t size, size_t input) {
    if (letter == '*') return;
    const bool is_number = letter >= '0' && letter <= '9';
    int64_t& known = sizes_[static_cast<unsigned char>(letter)];
    if (known == kUnbound) known = is_number ? letter - '0' : size;
    if (known != size) {
        throw std::invalid_argument("input " + std::to_string(input) + ": " + letter + " is " + std::to_string(size) +
                                    ", expected " + std::to_string(known));
    }
}

OperatorPlugin::OperatorPlugin(const char* name, Signature signature)
    : name_(name),
      signature_(std::move(signature)),
      num_inputs_(static_cast<int32_t>(signature_.inputs.size()) - signature_.num_optional) {}

nvinfer1::IPluginCapability* OperatorPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

const char* OperatorPlugin::getPluginVersion() const noexcept {
    return kOperatorVersion;
}

bool OperatorPlugin::has_counts(int32_t num_inputs, int32_t num_outputs) const noexcept {
    const auto most = static_cast<int32_t>(signature_.inputs.size());
    return (num_inputs == most || num_inputs == most - signature_.num_optional) && num_outputs == getNbOutputs();
}

int32_t OperatorPlugin::getOutputDataTypes(DataType* outputs, int32_t num_outputs, const DataType* inputs,
                                           int32_t num_inputs) const noexcept {
    if (!has_counts(num_inputs, num_outputs)) return kFailure;
    for (int32_t i = 0; i < num_outputs; ++i) {
        outputs[i] = inputs[signature_.outputs_like[i]];
    }
    return 0;
}

int32_t OperatorPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                                        const nvinfer1::DimsExprs*, int32_t, nvinfer1::DimsExprs* outputs,
                                        int32_t num_outputs, nvinfer1::IExprBuilder&) noexcept {
    if (!has_counts(num_inputs, num_outputs)) return kFailure;
    for (int32_t i = 0; i < num_outputs; ++i) {
        outputs[i] = inputs[signature_.outputs_like[i]];
    }
    return 0;
}

bool OperatorPlugin::supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                               int32_t num_inputs, int32_t num_outputs) noexcept {
    if (!has_counts(num_inputs, num_outputs) || position < 0 || position >= num_inputs + num_outputs) return false;
    const PluginTensorDesc& desc = tensors[position].desc;
    if (desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position >= num_inputs) return desc.type == tensors[signature_.outputs_like[position - num_inputs]].desc.type;
    const auto kind_of = [&](int32_t input) {
        const TensorKind kind = signature_.inputs[input].kind;
        const bool is_scaled = num_inputs == static_cast<int32_t>(signature_.inputs.size());
        return kind == TensorKind::kMemory && !is_scaled ? TensorKind::kActivation : kind;
    };
    int32_t first = 0;
    while (kind_of(first) != kind_of(position)) {
        ++first;
    }
    return has_type(kind_of(position), desc.type, tensors[first].desc.type);
}

int32_t OperatorPlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                        const nvinfer1::DynamicPluginTensorDesc*, int32_t num_outputs) noexcept {
    return guarded(name_, kFailure, [&] {
        if (!has_counts(num_inputs, num_outputs)) throw std::invalid_argument("wrong number of inputs or outputs");
        const Sizes sizes(signature_.inputs, largest(inputs, num_inputs).data(), num_inputs);
        return 0;
    });
}

size_t OperatorPlugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                        const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept {
    return guarded(name_, size_t{0}, [&] {
        const auto descs = largest(inputs, num_inputs);
        return workspace_bytes(Sizes(signature_.inputs, descs.data(), num_inputs));
    });
}

int32_t OperatorPlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t num_inputs, const PluginTensorDesc*,
                                      int32_t num_outputs) noexcept {
    return guarded(name_, kFailure, [&] {
        if (!has_counts(num_inputs, num_outputs)) throw std::invalid_argument("wrong number of inputs or outputs");
        const Sizes sizes(signature_.inputs, inputs, num_inputs);
        num_inputs_ = num_inputs;
        return 0;
    });
}

int32_t OperatorPlugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*, const void* const* inputs,
                                void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    return guarded(name_, kFailure, [&] {
        const Sizes sizes(signature_.inputs, input_descs, num_inputs_);
        const int status = run({sizes, input_descs, inputs, num_inputs_, outputs, workspace, stream});
        if (status != MGD_OK) throw std::runtime_error(mgd_status_string(status));
        return 0;
    });
}

const nvinfer1::PluginFieldCollection* OperatorPlugin::getFieldsToSerialize() noexcept {
    return guarded(name_, static_cast<const nvinfer1::PluginFieldCollection*>(nullptr), [&] {
        serialized_ = fields();
        collection_ = {static_cast<int32_t>(serialized_.size()), serialized_.data()};
        return static_cast<const nvinfer1::PluginFieldCollection*>(&collection_);
    });
}

OperatorCreator::OperatorCreator(const char* name, std::vector<PluginField> fields)
    : name_(name), fields_(std::move(fields)) {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

const char* OperatorCreator::getPluginVersion() const noexcept {
    return kOperatorVersion;
}

nvinfer1::IPluginV3* OperatorCreator::createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                                   nvinfer1::TensorRTPhase) noexcept {
    return guarded(name_, static_cast<nvinfer1::IPluginV3*>(nullptr), [&] {
        const nvinfer1::PluginFieldCollection none{};
        const nvinfer1::PluginFieldCollection& given = fields == nullptr ? none : *fields;
        for (int32_t i = 0; i < given.nbFields; ++i) {
            check_field(given.fields[i]);
        }
        return create(given);
    });
}

void OperatorCreator::check_field(const PluginField& field) const {
    const std::string name = field.name == nullptr ? "(no name)" : field.name;
    const auto declared =
        std::find_if(fields_.begin(), fields_.end(), [&](const PluginField& known) { return name == known.name; });
    if (declared == fields_.end()) throw std::invalid_argument("unknown field " + name);
    if (field.data == nullptr) throw std::invalid_argument("field " + name + " has no data");
    if (field.type != declared->type || field.length != declared->length) {
        throw std::invalid_argument("field " + name + " has type " + std::to_string(static_cast<int>(field.type)) +
                                    " and length " + std::to_string(field.length) + ", expected type " +
                                    std::to_string(static_cast<int>(declared->type)) + " and length " +
                                    std::to_string(declared->length));
    }
}

}  // namespace megalodon
