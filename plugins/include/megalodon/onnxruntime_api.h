// The part of ONNX Runtime's C interface that our libraries call, without ONNX Runtime's headers: what runs a graph
// (cpp/) and what makes a library of custom operators (plugins/onnxruntime).
//
// The interface is a table of functions that only ever grows at its end: a function keeps its place in every later
// release (ONNX Runtime's build asserts so, and its bindings in other languages rely on it). So a place is as good as a
// name; the tests load both libraries into the installed ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megalodon::ort {

// Opaque; made and released by the functions below.
struct Status;
struct Env;
struct Session;
struct SessionOptions;
struct MemoryInfo;
struct Value;
struct Allocator;
struct RunOptions;
struct TensorInfo;
struct KernelContext;
struct KernelInfo;
struct CustomOpDomain;

struct ApiBase {
    const void* (*get_api)(std::uint32_t version);
    const char* (*get_version_string)();
};

// Versions of the interface, which count the releases. Places up to 101 are those of the first.
constexpr std::uint32_t kFirstVersion = 1;
constexpr std::uint32_t kOperatorsVersion = 18;  // the first with everything that custom operators need here

constexpr std::int32_t kFail = 1;  // OrtErrorCode
constexpr int kLogErrors = 3;
constexpr int kArenaAllocator = 1;
constexpr int kDefaultMemory = 0;

// ONNX's numbers for element types.
enum ElementType {
    kAnyType = 0,
    kFloat = 1,
    kInt8 = 3,
    kInt64 = 7,
    kFloat16 = 10,
    kBFloat16 = 16,
    kFloat8E4M3 = 17,
    kInt4 = 22
};

// Functions by their place in the table; all but the releases return null or a status to be released.
template <typename Signature, int place>
struct Function {
    using Pointer = Signature*;
    static constexpr int kPlace = place;
};

using CreateStatus = Function<Status*(std::int32_t code, const char* message), 0>;
using GetErrorMessage = Function<const char*(const Status*), 2>;
using ReleaseStatus = Function<void(Status*), 93>;

// To run a graph.
using CreateEnv = Function<Status*(int severity, const char* id, Env** out), 3>;
using CreateSession = Function<Status*(const Env*, const char* path, const SessionOptions*, Session** out), 7>;
using Run =
    Function<Status*(Session*, const RunOptions*, const char* const* input_names, const Value* const* inputs,
                     std::size_t num_inputs, const char* const* output_names, std::size_t num_outputs, Value** outputs),
             9>;
using CreateSessionOptions = Function<Status*(SessionOptions** out), 10>;
using SetLogSeverity = Function<Status*(SessionOptions*, int severity), 22>;
using SetIntraOpNumThreads = Function<Status*(SessionOptions*, int count), 24>;
using RegisterCustomOpsLibrary = Function<Status*(SessionOptions*, const char* path, void** handle), 29>;
using SessionGetInputCount = Function<Status*(const Session*, std::size_t* out), 30>;
using SessionGetInputName = Function<Status*(const Session*, std::size_t index, Allocator*, char** out), 36>;
using CreateTensorWithData =
    Function<Status*(const MemoryInfo*, void* data, std::size_t bytes, const std::int64_t* shape, std::size_t rank,
                     int element_type, Value** out),
             49>;
using CreateCpuMemoryInfo = Function<Status*(int allocator_type, int memory_type, MemoryInfo** out), 69>;
using AllocatorFree = Function<Status*(Allocator*, void*), 76>;
using GetDefaultAllocator = Function<Status*(Allocator** out), 78>;
using ReleaseEnv = Function<void(Env*), 92>;
using ReleaseMemoryInfo = Function<void(MemoryInfo*), 94>;
using ReleaseSession = Function<void(Session*), 95>;
using ReleaseValue = Function<void(Value*), 96>;
using ReleaseSessionOptions = Function<void(SessionOptions*), 100>;

// To be a custom operator.
struct CustomOperator;
using CreateCustomOpDomain = Function<Status*(const char* domain, CustomOpDomain** out), 26>;
using CustomOpDomainAdd = Function<Status*(CustomOpDomain*, const CustomOperator*), 27>;
using AddCustomOpDomain = Function<Status*(SessionOptions*, CustomOpDomain*), 28>;
using GetTensorData = Function<Status*(Value*, void** out), 51>;
using GetElementType = Function<Status*(const TensorInfo*, std::int32_t* out), 60>;
using GetNumDimensions = Function<Status*(const TensorInfo*, std::size_t* out), 61>;
using GetDimensions = Function<Status*(const TensorInfo*, std::int64_t* out, std::size_t count), 62>;
using GetTensorInfo = Function<Status*(const Value*, TensorInfo** out), 65>;
using GetFloatAttribute = Function<Status*(const KernelInfo*, const char* name, float* out), 85>;
using GetIntAttribute = Function<Status*(const KernelInfo*, const char* name, std::int64_t* out), 86>;
using GetNumInputs = Function<Status*(const KernelContext*, std::size_t* out), 88>;
using GetInput = Function<Status*(const KernelContext*, std::size_t index, const Value** out), 90>;
using GetOutput =
    Function<Status*(KernelContext*, std::size_t index, const std::int64_t* shape, std::size_t rank, Value** out), 91>;
using ReleaseTensorInfo = Function<void(TensorInfo*), 99>;
using GetConstantInput =
    Function<Status*(const KernelInfo*, std::size_t index, int* is_constant, const Value** out), 249>;
using ParallelFor = Function<Status*(const KernelContext*, void (*work)(void* data, std::size_t index),
                                     std::size_t total, std::size_t num_batches, void* data),
                             274>;

class Api {
 public:
    explicit Api(const void* table) : table_(static_cast<void* const*>(table)) {}

    template <typename F, typename... Arguments>
    auto call(Arguments... arguments) const {
        return reinterpret_cast<typename F::Pointer>(table_[F::kPlace])(arguments...);
    }

 private:
    void* const* table_;
};

// OrtCustomOp as of version 16 of the interface, which names these fields and no later ones.
struct CustomOperator {
    std::uint32_t version = 16;
    void* create_kernel_without_status = nullptr;
    const char* (*name)(const CustomOperator*);
    const char* (*execution_provider)(const CustomOperator*);
    std::int32_t (*input_type)(const CustomOperator*, std::size_t index);
    std::size_t (*num_inputs)(const CustomOperator*);
    std::int32_t (*output_type)(const CustomOperator*, std::size_t index);
    std::size_t (*num_outputs)(const CustomOperator*);
    void* compute_without_status = nullptr;
    void (*destroy_kernel)(void* kernel);
    std::int32_t (*input_characteristic)(const CustomOperator*, std::size_t index);
    std::int32_t (*output_characteristic)(const CustomOperator*, std::size_t index);
    std::int32_t (*input_memory_type)(const CustomOperator*, std::size_t index);
    std::int32_t (*variadic_input_min)(const CustomOperator*);
    std::int32_t (*variadic_input_same_type)(const CustomOperator*);
    std::int32_t (*variadic_output_min)(const CustomOperator*);
    std::int32_t (*variadic_output_same_type)(const CustomOperator*);
    Status* (*create_kernel)(const CustomOperator*, const void* api_table, const KernelInfo*, void** kernel);
    Status* (*compute)(void* kernel, KernelContext*);
};

}  // namespace megalodon::ort
