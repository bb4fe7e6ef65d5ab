#include "common/normalising_plugin.h"
#include "megalodon/megalodon.h"
#include "megalodon/state_layout.h"

namespace megalodon {
namespace {

// TimestepNorm's inputs, then those of ComplexEMA that it does not share.
enum Input { kX, kPastNorm, kPosition, kWeight, kBias, kPastEma, kP, kQPowers, kGamma, kOmega };
enum Output { kU, kPresentNorm, kY, kPresentEma };

Signature signature() {
    static_assert(kNormParts == 4 && kComplexParts == 2, "the dimension strings say so");
    std::vector<InputSpec> inputs = {
        {TensorKind::kActivation, "BTD"},  // x
        {TensorKind::kFloat32, "BG4"},     // past_norm
        {TensorKind::kInt64, "B"},         // position
        {TensorKind::kFloat32, "D"},       // weight
        {TensorKind::kFloat32, "D"},       // bias
        {TensorKind::kFloat32, "BDN2"},    // past_cema
        {TensorKind::kFloat32, "DN"},      // p
        {TensorKind::kFloat32, "*DN2"},    // q_powers: the kernel reads the first, q itself
        {TensorKind::kFloat32, "DN2"},     // gamma
        {TensorKind::kFloat32, "D"},       // omega
    };
    return {std::move(inputs), {kX, kPastNorm, kX, kPastEma}};
}

class NormEmaPlugin final : public NormalisingPlugin {
 public:
    explicit NormEmaPlugin(float epsilon) : NormalisingPlugin(kTimestepNormComplexEma, signature(), epsilon) {}

    nvinfer1::IPluginV3* clone() noexcept override { return copy_of(*this); }

 protected:
    size_t workspace_bytes(const Sizes& sizes) const override {
        return mgd_timestep_norm_complex_ema_workspace_bytes(sizes['B'], sizes['T'], sizes['D'], sizes['G'],
                                                             sizes['N']);
    }

    int run(const EnqueueCall& call) const override {
        const Sizes& sizes = call.sizes;
        return mgd_timestep_norm_complex_ema(
            call.dtype(kX), sizes['B'], sizes['T'], sizes['D'], sizes['G'], sizes['N'], call.inputs[kX],
            call.float32(kPastNorm), call.int64(kPosition), call.float32(kWeight), call.float32(kBias), epsilon(),
            call.float32(kPastEma), call.float32(kP), call.float32(kQPowers), call.float32(kGamma),
            call.float32(kOmega), call.outputs[kU], static_cast<float*>(call.outputs[kPresentNorm]), call.outputs[kY],
            static_cast<float*>(call.outputs[kPresentEma]), call.workspace, workspace_bytes(sizes), call.stream);
    }
};

}  // namespace

OperatorCreator& norm_ema_creator() {
    // Never destroyed: TensorRT's registry may look at it later.
    static auto* creator = new NormalisingCreator<NormEmaPlugin>(kTimestepNormComplexEma);
    return *creator;
}

}  // namespace megalodon
