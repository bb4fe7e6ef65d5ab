// The part of ONNX Runtime's binary interface that a library of custom operators calls, declared by slot.
//
// No package registry carries ONNX Runtime's headers beside its wheels, so the few entries used here are declared by
// their place. Both tables only ever grow at their end (onnxruntime_c_api.h: "all APIs are versioned"), which makes a
// place as good as a name; a test loads this library into the installed ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megalodon::ort {

struct Status;
struct KernelContext;
struct KernelInfo;
struct Value;
struct TensorInfo;
struct CustomOpDomain;
struct SessionOptions;

constexpr uint32_t kApiVersion = 18;  // the first with everything below: ONNX Runtime 1.18
constexpr int32_t kFail = 1;          // OrtErrorCode
constexpr int32_t kFloat = 1;         // ONNXTensorElementDataType
constexpr int32_t kInt64 = 7;

/// OrtApi: a table of functions. Those of a void pointer's type are not used.
struct Api {
    Status* (*create_status)(int32_t code, const char* message);  // 0
    void* slot_1;
    const char* (*error_message)(const Status* status);  // 2
    void* slots_3_25[23];
    Status* (*create_custom_op_domain)(const char* domain, CustomOpDomain** out);              // 26
    Status* (*custom_op_domain_add)(CustomOpDomain* domain, const struct CustomOperator* op);  // 27
    Status* (*add_custom_op_domain)(SessionOptions* options, CustomOpDomain* domain);          // 28
    void* slots_29_50[22];
    Status* (*tensor_data)(Value* value, void** out);  // 51
    void* slots_52_60[9];
    Status* (*num_dimensions)(const TensorInfo* info, size_t* out);             // 61
    Status* (*dimensions)(const TensorInfo* info, int64_t* out, size_t count);  // 62
    void* slots_63_64[2];
    Status* (*tensor_info)(const Value* value, TensorInfo** out);  // 65
    void* slots_66_84[19];
    Status* (*float_attribute)(const KernelInfo* info, const char* name, float* out);  // 85
    void* slots_86_89[4];
    Status* (*input)(const KernelContext* context, size_t index, const Value** out);                          // 90
    Status* (*output)(KernelContext* context, size_t index, const int64_t* dims, size_t count, Value** out);  // 91
    void* slot_92;
    void (*release_status)(Status* status);  // 93
    void* slots_94_98[5];
    void (*release_tensor_info)(TensorInfo* info);  // 99
    void* slots_100_273[174];
    Status* (*parallel_for)(const KernelContext* context, void (*work)(void* data, size_t index), size_t total,
                            size_t num_batches, void* data);  // 274
};

struct ApiBase {
    const Api* (*api)(uint32_t version);
    const char* (*version)();
};

/// OrtCustomOp as of interface version 16, which names these fields and no later ones.
struct CustomOperator {
    uint32_t version = 16;
    void* create_kernel_without_status = nullptr;
    const char* (*name)(const CustomOperator*);
    const char* (*execution_provider)(const CustomOperator*);
    int32_t (*input_type)(const CustomOperator*, size_t index);
    size_t (*num_inputs)(const CustomOperator*);
    int32_t (*output_type)(const CustomOperator*, size_t index);
    size_t (*num_outputs)(const CustomOperator*);
    void* compute_without_status = nullptr;
    void (*destroy_kernel)(void* kernel);
    int32_t (*input_characteristic)(const CustomOperator*, size_t index);
    int32_t (*output_characteristic)(const CustomOperator*, size_t index);
    int32_t (*input_memory_type)(const CustomOperator*, size_t index);
    int32_t (*variadic_input_min)(const CustomOperator*);
    int32_t (*variadic_input_same_type)(const CustomOperator*);
    int32_t (*variadic_output_min)(const CustomOperator*);
    int32_t (*variadic_output_same_type)(const CustomOperator*);
    Status* (*create_kernel)(const CustomOperator*, const Api*, const KernelInfo*, void** kernel);
    Status* (*compute)(void* kernel, KernelContext*);
};

}  // namespace megalodon::ort
