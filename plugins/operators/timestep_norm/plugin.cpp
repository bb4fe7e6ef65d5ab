#include "common/normalising_plugin.h"
#include "megalodon/megalodon.h"
#include "megalodon/state_layout.h"

namespace megalodon {
namespace {

// Inputs in the ONNX operator's order.
enum Input { kX, kPast, kPosition, kWeight, kBias };
enum Output { kY, kPresent };

Signature signature() {
    static_assert(kNormParts == 4, "the dimension strings say 4");
    std::vector<InputSpec> inputs = {
        {TensorKind::kActivation, "BTD"},  // x
        {TensorKind::kFloat32, "BG4"},     // past_norm
        {TensorKind::kInt64, "B"},         // position
        {TensorKind::kFloat32, "D"},       // weight
        {TensorKind::kFloat32, "D"},       // bias
    };
    return {std::move(inputs), {kX, kPast}};
}

class TimestepNormPlugin final : public NormalisingPlugin {
 public:
    explicit TimestepNormPlugin(float epsilon) : NormalisingPlugin(kTimestepNorm, signature(), epsilon) {}

    nvinfer1::IPluginV3* clone() noexcept override { return copy_of(*this); }

 protected:
    size_t workspace_bytes(const Sizes& sizes) const override {
        return mgd_timestep_norm_workspace_bytes(sizes['B'], sizes['T'], sizes['G']);
    }

    int run(const EnqueueCall& call) const override {
        const Sizes& sizes = call.sizes;
        // TensorRT has granted getWorkspaceSize's answer for the largest call of the profile, which no call exceeds.
        return mgd_timestep_norm(call.dtype(kX), sizes['B'], sizes['T'], sizes['D'], sizes['G'], call.inputs[kX],
                                 call.float32(kPast), call.int64(kPosition), call.float32(kWeight), call.float32(kBias),
                                 epsilon(), nullptr, call.outputs[kY], static_cast<float*>(call.outputs[kPresent]),
                                 call.workspace, workspace_bytes(sizes), call.stream);
    }
};

}  // namespace

OperatorCreator& timestep_norm_creator() {
    // Never destroyed: TensorRT's registry may look at it later.
    static auto* creator = new NormalisingCreator<TimestepNormPlugin>(kTimestepNorm);
    return *creator;
}

}  // namespace megalodon
