// The part of ONNX Runtime's C interface that this library calls.
//
// The interface is a table of functions that only ever grows at its end: those of the first version, 102 of them, have
// had their places since ONNX Runtime 1.0 (its build asserts so), and bindings in other languages rely on them
// likewise. With the places written here, no header of ONNX Runtime is needed to build, and every later release runs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace megalodon::detail::ort {

// Opaque; made and released by the functions below.
struct Status;
struct Env;
struct Session;
struct SessionOptions;
struct MemoryInfo;
struct Value;
struct Allocator;
struct RunOptions;

struct ApiBase {
    const void* (*get_api)(std::uint32_t version);
    const char* (*get_version_string)();
};

constexpr std::uint32_t kApiVersion = 1;
constexpr int kLogErrors = 3;
constexpr int kArenaAllocator = 1;
constexpr int kDefaultMemory = 0;

// ONNX's numbers for element types.
enum ElementType { kFloat = 1, kInt8 = 3, kInt64 = 7, kFloat16 = 10, kBFloat16 = 16, kFloat8E4M3 = 17 };

// Functions by their place in the table; all but the releases return null or a status to be released.
template <typename Signature, int place>
struct Function {
    using Pointer = Signature*;
    static constexpr int kPlace = place;
};

using GetErrorMessage = Function<const char*(const Status*), 2>;
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
using ReleaseStatus = Function<void(Status*), 93>;
using ReleaseMemoryInfo = Function<void(MemoryInfo*), 94>;
using ReleaseSession = Function<void(Session*), 95>;
using ReleaseValue = Function<void(Value*), 96>;
using ReleaseSessionOptions = Function<void(SessionOptions*), 100>;

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

}  // namespace megalodon::detail::ort
