// What the operators' TensorRT plugins share: tensors described by a table, dimension checks, logging, serialisation.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

namespace megalodon {

/// Activations are all of one type, that of input 0. Key/value memory has their type as well; where the optional inputs
/// are given, its scales, it has one of the two types of 8 bits.
enum class TensorKind { kActivation, kMemory, kFloat32, kInt64 };

/// One input of an operator. `dims` has a letter per dimension; equal letters must have equal sizes within a call, a
/// digit is that size itself, and '*' is any size.
struct InputSpec {
    TensorKind kind;
    const char* dims;
};

/// Inputs in the ONNX operator's order; each output has type and shape of the input that `outputs_like` names. The last
/// `num_optional` inputs are there together or not at all.
struct Signature {
    std::vector<InputSpec> inputs;
    std::vector<int32_t> outputs_like;
    int32_t num_optional = 0;
};

/// Writes one line about a plugin to the standard error stream. TensorRT's own logger cannot be reached without linking
/// TensorRT: the interface that hands it over differs between versions 10 and 11.
void log_error(const char* plugin, const char* message) noexcept;

/// The C interface's number for a type of activations or key/value memory, -1 for any other type.
int dtype_of(nvinfer1::DataType type) noexcept;

/// Bound sizes of a call by letter. Throws std::invalid_argument naming the input that does not fit.
class Sizes {
 public:
    Sizes(const std::vector<InputSpec>& specs, const nvinfer1::PluginTensorDesc* inputs, int32_t num_inputs);
    int64_t operator[](char letter) const { return sizes_[static_cast<unsigned char>(letter)]; }

 private:
    void bind(char letter, int64_t size, size_t input);
    std::vector<int64_t> sizes_ = std::vector<int64_t>(128, kUnbound);
    static constexpr int64_t kUnbound = -1;
};

/// What a plugin hands to the C interface.
struct EnqueueCall {
    const Sizes& sizes;
    const nvinfer1::PluginTensorDesc* descs;
    const void* const* inputs;
    int32_t num_inputs;
    void* const* outputs;
    void* workspace;
    cudaStream_t stream;

    int dtype(int32_t input) const { return dtype_of(descs[input].type); }
    const float* float32(int32_t input) const {
        return input < num_inputs ? static_cast<const float*>(inputs[input]) : nullptr;
    }
    const int64_t* int64(int32_t input) const { return static_cast<const int64_t*>(inputs[input]); }
};

class OperatorPlugin : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuild,
                       public nvinfer1::IPluginV3OneRuntime {
 public:
    OperatorPlugin(const char* name, Signature signature);

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;

    const char* getPluginName() const noexcept override { return name_; }
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override { return ""; }

    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(signature_.outputs_like.size()); }
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t num_outputs, const nvinfer1::DataType* inputs,
                               int32_t num_inputs) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs, const nvinfer1::DimsExprs*, int32_t,
                            nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                   int32_t num_inputs, int32_t num_outputs) noexcept override;
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                            const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t num_outputs) noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                            const nvinfer1::DynamicPluginTensorDesc* outputs,
                            int32_t num_outputs) const noexcept override;

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::PluginTensorDesc* outputs, int32_t num_outputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc* output_descs,
                    const void* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 protected:
    /// A copy of `plugin`, nullptr where memory runs out: what clone() is in every operator.
    template <typename Plugin>
    static nvinfer1::IPluginV3* copy_of(const Plugin& plugin) noexcept {
        try {
            return new Plugin(plugin);
        } catch (...) {
            log_error(plugin.getPluginName(), "cannot be copied: no memory");
            return nullptr;
        }
    }

    /// Bytes of scratch memory for a call of these sizes.
    virtual size_t workspace_bytes(const Sizes&) const { return 0; }

    /// Calls the C interface and returns its status.
    virtual int run(const EnqueueCall& call) const = 0;

    /// The attributes, pointing into this object.
    virtual std::vector<nvinfer1::PluginField> fields() const { return {}; }

 private:
    bool has_counts(int32_t num_inputs, int32_t num_outputs) const noexcept;

    const char* name_;
    Signature signature_;
    int32_t num_inputs_;  // of this call; enqueue() is not told
    std::vector<nvinfer1::PluginField> serialized_;
    nvinfer1::PluginFieldCollection collection_{};
};

/// Makes plugins of one operator from fields, both when a network is parsed and when an engine is read.
class OperatorCreator : public nvinfer1::IPluginCreatorV3One {
 public:
    OperatorCreator(const char* name, std::vector<nvinfer1::PluginField> fields);

    nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginName() const noexcept override { return name_; }
    const char* getPluginVersion() const noexcept override;
    const char* getPluginNamespace() const noexcept override { return ""; }

 protected:
    /// Throws std::invalid_argument when a field's value is impossible. Names, types and lengths were checked.
    virtual nvinfer1::IPluginV3* create(const nvinfer1::PluginFieldCollection& fields) const = 0;

 private:
    void check_field(const nvinfer1::PluginField& field) const;

    const char* name_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

/// The creators, one for each operator; they live as long as the library.
OperatorCreator& chunk_attention_creator();
OperatorCreator& complex_ema_creator();
OperatorCreator& norm_ema_creator();
OperatorCreator& timestep_norm_creator();

}  // namespace megalodon
