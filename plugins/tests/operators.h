// What each plugin promises, written down apart from its code: the tensors and fields of the ONNX operator, and the C
// function that its enqueue() must be equal to. A plugin that getCreators() lists and that has no entry here fails.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace megalodon::tests {

/// kActivation is float32, float16 or bfloat16, the same for all such tensors of a call; the first input is one. The
/// tensors of 8 bits of a call may as well be of the other such type, all of them.
enum class Kind { kActivation, kFloat32, kInt64, kInt8, kFloat8 };

/// Equal letters are equal sizes, a digit is that size itself.
struct Tensor {
    Kind kind;
    const char* dims;
};

/// An attribute with one value, int32 or float32. `good` is a valid value other than `standard`; where that is NaN, no
/// plugin is made without the field.
struct Field {
    const char* name;
    bool is_float;
    double standard, good;
    std::vector<double> bad;
};

/// Tensors of one call, dense on the host, in the order of the operator.
struct HostCall {
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    std::map<std::string, double> fields;
    void* workspace;
    size_t workspace_bytes;

    template <typename Type>
    const Type* input(size_t index) const {
        return static_cast<const Type*>(inputs[index]);
    }
    template <typename Type>
    Type* output(size_t index) const {
        return static_cast<Type*>(outputs[index]);
    }
};

/// One way to use a plugin; a plugin with optional inputs has an entry for each number of them.
struct Operator {
    const char* name;
    const char* variant;  // of letters only
    std::vector<Tensor> inputs, outputs;
    std::vector<Field> fields;
    std::map<char, int64_t> sizes;  // of the letters, all different, so that swapped axes show
    int (*call)(void* library, const Operator& op, const HostCall& call);  // the same through the C interface
    int64_t size(char letter) const { return letter >= '0' && letter <= '9' ? letter - '0' : sizes.at(letter); }
};

/// Every plugin in every variant.
const std::vector<Operator>& operators();

}  // namespace megalodon::tests
