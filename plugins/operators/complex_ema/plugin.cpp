#include "common/plugin.h"
#include "megalodon/megalodon.h"
#include "megalodon/state_layout.h"

namespace megalodon {
namespace {

// Inputs in the ONNX operator's order.
enum Input { kX, kPast, kPosition, kP, kQPowers, kGamma, kOmega };
enum Output { kY, kPresent };

Signature signature() {
    static_assert(kComplexParts == 2, "the dimension strings say 2");
    std::vector<InputSpec> inputs = {
        {TensorKind::kActivation, "BTD"},  // x
        {TensorKind::kFloat32, "BDN2"},    // past_cema
        {TensorKind::kInt64, "B"},         // position
        {TensorKind::kFloat32, "DN"},      // p
        {TensorKind::kFloat32, "*DN2"},    // q_powers: the kernel reads the first, q itself
        {TensorKind::kFloat32, "DN2"},     // gamma
        {TensorKind::kFloat32, "D"},       // omega
    };
    return {std::move(inputs), {kX, kPast}};
}

class ComplexEmaPlugin final : public OperatorPlugin {
 public:
    ComplexEmaPlugin() : OperatorPlugin(kComplexEma, signature()) {}

    nvinfer1::IPluginV3* clone() noexcept override { return copy_of(*this); }

 protected:
    size_t workspace_bytes(const Sizes& sizes) const override {
        return mgd_complex_ema_workspace_bytes(sizes['B'], sizes['T'], sizes['D'], sizes['N']);
    }

    int run(const EnqueueCall& call) const override {
        const Sizes& sizes = call.sizes;
        return mgd_complex_ema(call.dtype(kX), sizes['B'], sizes['T'], sizes['D'], sizes['N'], call.inputs[kX],
                               call.float32(kPast), call.int64(kPosition), call.float32(kP), call.float32(kQPowers),
                               call.float32(kGamma), call.float32(kOmega), nullptr, call.outputs[kY],
                               static_cast<float*>(call.outputs[kPresent]), call.workspace, workspace_bytes(sizes),
                               call.stream);
    }
};

class ComplexEmaCreator final : public OperatorCreator {
 public:
    ComplexEmaCreator() : OperatorCreator(kComplexEma, {}) {}

 protected:
    nvinfer1::IPluginV3* create(const nvinfer1::PluginFieldCollection&) const override {
        return new ComplexEmaPlugin();
    }
};

}  // namespace

OperatorCreator& complex_ema_creator() {
    static auto* creator = new ComplexEmaCreator();  // never destroyed: TensorRT's registry may look at it later
    return *creator;
}

}  // namespace megalodon
