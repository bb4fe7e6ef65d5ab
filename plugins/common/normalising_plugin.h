// What the plugins of operators that normalise share: their attribute, epsilon.
#pragma once

#include <cmath>
#include <stdexcept>

#include "common/plugin.h"
#include "megalodon/state_layout.h"

namespace megalodon {

class NormalisingPlugin : public OperatorPlugin {
 public:
    NormalisingPlugin(const char* name, Signature signature, float epsilon)
        : OperatorPlugin(name, std::move(signature)), epsilon_(epsilon) {}

 protected:
    float epsilon() const { return epsilon_; }

    std::vector<nvinfer1::PluginField> fields() const override {
        return {{kEpsilon, &epsilon_, nvinfer1::PluginFieldType::kFLOAT32, 1}};
    }

 private:
    float epsilon_;
};

/// Makes a Plugin(epsilon).
template <typename Plugin>
class NormalisingCreator final : public OperatorCreator {
 public:
    explicit NormalisingCreator(const char* name)
        : OperatorCreator(name, {{kEpsilon, nullptr, nvinfer1::PluginFieldType::kFLOAT32, 1}}) {}

 protected:
    nvinfer1::IPluginV3* create(const nvinfer1::PluginFieldCollection& fields) const override {
        const float epsilon =
            fields.nbFields == 0 ? kDefaultEpsilon : *static_cast<const float*>(fields.fields[0].data);
        if (!std::isfinite(epsilon) || epsilon <= 0) {
            throw std::invalid_argument("field epsilon is " + std::to_string(epsilon) + ", expected a positive number");
        }
        return new Plugin(epsilon);
    }
};

}  // namespace megalodon
