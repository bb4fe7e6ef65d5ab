#include <stdexcept>

#include "common/plugin.h"
#include "megalodon/megalodon.h"
#include "megalodon/state_layout.h"

namespace megalodon {
namespace {

// Inputs in the ONNX operator's order.
enum Input { kQ, kK, kV, kPastKey, kPastValue, kPosition, kPastKeyScale, kPastValueScale };

// Letters beyond those of the C interface: K for dz, V for dv.
Signature signature() {
    std::vector<InputSpec> inputs = {
        {TensorKind::kActivation, "BHTK"},  // q
        {TensorKind::kActivation, "BHTK"},  // k
        {TensorKind::kActivation, "BHTV"},  // v
        {TensorKind::kMemory, "BHSK"},      // past_key
        {TensorKind::kMemory, "BHSV"},      // past_value
        {TensorKind::kInt64, "B"},          // position
        {TensorKind::kFloat32, "BHS"},      // past_key_scale
        {TensorKind::kFloat32, "BHS"},      // past_value_scale
    };
    return {std::move(inputs), {kV}, 2};
}

class ChunkAttentionPlugin final : public OperatorPlugin {
 public:
    explicit ChunkAttentionPlugin(int32_t chunk_size)
        : OperatorPlugin(kChunkAttention, signature()), chunk_size_(chunk_size) {}

    nvinfer1::IPluginV3* clone() noexcept override { return copy_of(*this); }

 protected:
    size_t workspace_bytes(const Sizes& sizes) const override {
        return mgd_chunk_attention_workspace_bytes(sizes['B'], sizes['H'], sizes['S'], sizes['V']);
    }

    int run(const EnqueueCall& call) const override {
        const Sizes& sizes = call.sizes;
        return mgd_chunk_attention(call.dtype(kQ), call.dtype(kPastKey), sizes['B'], sizes['H'], sizes['T'], sizes['S'],
                                   sizes['K'], sizes['V'], call.inputs[kQ], call.inputs[kK], call.inputs[kV],
                                   call.inputs[kPastKey], call.inputs[kPastValue], call.int64(kPosition),
                                   call.float32(kPastKeyScale), call.float32(kPastValueScale), chunk_size_,
                                   call.outputs[0], call.workspace, workspace_bytes(sizes), call.stream);
    }

    std::vector<nvinfer1::PluginField> fields() const override {
        return {{kChunkSize, &chunk_size_, nvinfer1::PluginFieldType::kINT32, 1}};
    }

 private:
    int32_t chunk_size_;
};

class ChunkAttentionCreator final : public OperatorCreator {
 public:
    ChunkAttentionCreator()
        : OperatorCreator(kChunkAttention, {{kChunkSize, nullptr, nvinfer1::PluginFieldType::kINT32, 1}}) {}

 protected:
    nvinfer1::IPluginV3* create(const nvinfer1::PluginFieldCollection& fields) const override {
        if (fields.nbFields == 0) throw std::invalid_argument("field chunk_size is missing");
        const int32_t chunk_size = *static_cast<const int32_t*>(fields.fields[0].data);
        if (chunk_size < 1) {
            throw std::invalid_argument("field chunk_size is " + std::to_string(chunk_size) +
                                        ", expected a positive number");
        }
        return new ChunkAttentionPlugin(chunk_size);
    }
};

}  // namespace

OperatorCreator& chunk_attention_creator() {
    static auto* creator = new ChunkAttentionCreator();  // never destroyed: TensorRT's registry may look at it later
    return *creator;
}

}  // namespace megalodon
