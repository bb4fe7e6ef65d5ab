#include <cmath>
#include <stdexcept>

#include "common/plugin.h"
#include "megalodon/megalodon.h"
#include "megalodon/state_layout.h"

namespace megalodon {
namespace {

// Inputs in the ONNX operator's order.
enum Input { kX, kPast, kPosition, kWeight, kBias };
enum Output { kY, kPresent };

std::vector<InputSpec> input_specs() {
    static_assert(kNormParts == 4, "the dimension strings say 4");
    return {
        {TensorKind::kActivation, "BTD"},  // x
        {TensorKind::kFloat32, "BG4"},     // past_norm
        {TensorKind::kInt64, "B"},         // position
        {TensorKind::kFloat32, "D"},       // weight
        {TensorKind::kFloat32, "D"},       // bias
    };
}

class TimestepNormPlugin final : public OperatorPlugin {
 public:
    explicit TimestepNormPlugin(float epsilon) : OperatorPlugin(kTimestepNorm, input_specs()), epsilon_(epsilon) {}

    nvinfer1::IPluginV3* clone() noexcept override { return copy_of(*this); }

 protected:
    size_t workspace_bytes(const Sizes& sizes) const override {
        return mgd_timestep_norm_workspace_bytes(sizes['B'], sizes['T'], sizes['G']);
    }

    int run(int dtype, const Sizes& sizes, const void* const* inputs, void* const* outputs, void* workspace,
            cudaStream_t stream) const override {
        const auto float32 = [&](Input input) { return static_cast<const float*>(inputs[input]); };
        // TensorRT has granted getWorkspaceSize's answer for the largest call of the profile, which no call exceeds.
        return mgd_timestep_norm(dtype, sizes['B'], sizes['T'], sizes['D'], sizes['G'], inputs[kX], float32(kPast),
                                 static_cast<const int64_t*>(inputs[kPosition]), float32(kWeight), float32(kBias),
                                 epsilon_, outputs[kY], static_cast<float*>(outputs[kPresent]), workspace,
                                 workspace_bytes(sizes), stream);
    }

    std::vector<nvinfer1::PluginField> fields() const override {
        return {{kEpsilon, &epsilon_, nvinfer1::PluginFieldType::kFLOAT32, 1}};
    }

 private:
    float epsilon_;
};

class TimestepNormCreator final : public OperatorCreator {
 public:
    TimestepNormCreator()
        : OperatorCreator(kTimestepNorm, {{kEpsilon, nullptr, nvinfer1::PluginFieldType::kFLOAT32, 1}}) {}

 protected:
    nvinfer1::IPluginV3* create(const nvinfer1::PluginFieldCollection& fields) const override {
        const float epsilon =
            fields.nbFields == 0 ? kDefaultEpsilon : *static_cast<const float*>(fields.fields[0].data);
        if (!std::isfinite(epsilon) || epsilon <= 0) {
            throw std::invalid_argument("field epsilon is " + std::to_string(epsilon) + ", expected a positive number");
        }
        return new TimestepNormPlugin(epsilon);
    }
};

}  // namespace

OperatorCreator& timestep_norm_creator() {
    static auto* creator = new TimestepNormCreator();  // never destroyed: TensorRT's registry may look at it later
    return *creator;
}

}  // namespace megalodon
