#include "common/plugin.h"
#include "megalodon/megalodon.h"
#include "megalodon/state_layout.h"

namespace megalodon {
namespace {

// Inputs in the ONNX operator's order.
enum Input { kX, kPast, kPosition, kP, kQPowers, kGamma, kOmega };
enum Output { kY, kPresent };

std::vector<InputSpec> input_specs() {
    static_assert(kComplexParts == 2, "the dimension strings say 2");
    return {
        {TensorKind::kActivation, "BTD"},  // x
        {TensorKind::kFloat32, "BDN2"},    // past_cema
        {TensorKind::kInt64, "B"},         // position
        {TensorKind::kFloat32, "DN"},      // p
        {TensorKind::kFloat32, "*DN2"},    // q_powers: the kernel reads the first, q itself
        {TensorKind::kFloat32, "DN2"},     // gamma
        {TensorKind::kFloat32, "D"},       // omega
    };
}

class ComplexEmaPlugin final : public OperatorPlugin {
 public:
    ComplexEmaPlugin() : OperatorPlugin(kComplexEma, input_specs()) {}

    nvinfer1::IPluginV3* clone() noexcept override { return copy_of(*this); }

 protected:
    int run(int dtype, const Sizes& sizes, const void* const* inputs, void* const* outputs, void*,
            cudaStream_t stream) const override {
        const auto float32 = [&](Input input) { return static_cast<const float*>(inputs[input]); };
        return mgd_complex_ema(dtype, sizes['B'], sizes['T'], sizes['D'], sizes['N'], inputs[kX], float32(kPast),
                               static_cast<const int64_t*>(inputs[kPosition]), float32(kP), float32(kQPowers),
                               float32(kGamma), float32(kOmega), outputs[kY], static_cast<float*>(outputs[kPresent]),
                               stream);
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
