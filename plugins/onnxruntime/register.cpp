// The library's one entry: ONNX Runtime calls it with the session's options, and finds the operators.

#include <exception>
#include <map>
#include <mutex>
#include <new>

#include "megalodon/state_layout.h"
#include "onnxruntime/operators.h"

namespace megalodon::ort {
namespace {

constexpr int32_t kRequired = 0, kOptional = 1;  // OrtCustomOpInputOutputCharacteristic

struct Kernel {
    Api api;
    float epsilon;
    int64_t chunk_size;  // 0 where the node has none
};

Status* create_kernel(const CustomOperator*, const void* table, const KernelInfo* info, void** out) {
    const Api api(table);
    auto* kernel = new (std::nothrow) Kernel{api, kDefaultEpsilon, 0};
    if (!kernel) return api.call<CreateStatus>(kFail, "megalodon operator: out of memory");
    for (Status* missing : {api.call<GetFloatAttribute>(info, kEpsilon, &kernel->epsilon),
                            api.call<GetIntAttribute>(info, kChunkSize, &kernel->chunk_size)}) {
        if (missing) api.call<ReleaseStatus>(missing);
    }
    *out = kernel;
    return nullptr;
}

/// ONNX Runtime is a C interface: nothing is thrown through it.
template <typename Own = Kernel, typename Compute>
Status* guarded(void* data, KernelContext* context, const Compute& compute) {
    const auto& kernel = *static_cast<Own*>(data);
    const Api& api = kernel.api;
    try {
        compute(Call(api, context), kernel);
        return nullptr;
    } catch (const std::exception& error) {
        return api.call<CreateStatus>(kFail, error.what());
    }
}

CustomOperator common_operator() {
    CustomOperator op;
    op.create_kernel = create_kernel;
    op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.execution_provider = [](const CustomOperator*) -> const char* { return nullptr; };  // the CPU
    op.input_type = [](const CustomOperator*, size_t index) -> int32_t {
        return index == 2 ? kInt64 : kFloat;  // the position
    };
    op.output_type = [](const CustomOperator*, size_t) -> int32_t { return kFloat; };
    op.num_outputs = [](const CustomOperator*) -> size_t { return 2; };
    op.input_characteristic = op.output_characteristic = [](const CustomOperator*, size_t) { return kRequired; };
    op.input_memory_type = [](const CustomOperator*, size_t) { return 0; };
    op.variadic_input_min = op.variadic_input_same_type = op.variadic_output_min =
        op.variadic_output_same_type = [](const CustomOperator*) { return 0; };
    return op;
}

CustomOperator complex_ema_operator() {
    CustomOperator op = common_operator();
    op.name = [](const CustomOperator*) { return kComplexEma; };
    op.num_inputs = [](const CustomOperator*) -> size_t { return 7; };
    op.compute = [](void* kernel, KernelContext* context) {
        return guarded(kernel, context, [](const Call& call, const Kernel&) { complex_ema(call); });
    };
    return op;
}

CustomOperator timestep_norm_operator() {
    CustomOperator op = common_operator();
    op.name = [](const CustomOperator*) { return kTimestepNorm; };
    op.num_inputs = [](const CustomOperator*) -> size_t { return 5; };
    op.compute = [](void* kernel, KernelContext* context) {
        return guarded(kernel, context, [](const Call& call, const Kernel& own) { timestep_norm(call, own.epsilon); });
    };
    return op;
}

CustomOperator chunk_attention_operator() {
    CustomOperator op = common_operator();
    op.name = [](const CustomOperator*) { return kChunkAttention; };
    op.num_inputs = [](const CustomOperator*) -> size_t { return 8; };
    op.num_outputs = [](const CustomOperator*) -> size_t { return 1; };
    op.input_type = [](const CustomOperator*, size_t index) -> int32_t {
        if (index == 3 || index == 4) return kAnyType;  // memory, which may be of 8 bits
        return index == 5 ? kInt64 : kFloat;
    };
    op.input_characteristic = [](const CustomOperator*, size_t index) -> int32_t {
        return index < 6 ? kRequired : kOptional;  // scales
    };
    op.compute = [](void* kernel, KernelContext* context) {
        return guarded(kernel, context,
                       [](const Call& call, const Kernel& own) { chunk_attention(call, own.chunk_size); });
    };
    return op;
}

struct Product {
    Api api;
    QuantizedMatMul product;
};

Tensor constant_input(const Api& api, const KernelInfo* info, size_t index) {
    int is_constant = 0;
    const Value* value = nullptr;
    check(api, api.call<GetConstantInput>(info, index, &is_constant, &value));
    Call::require(is_constant && value, "codes and scales that are initializers");
    return read_tensor(api, value);
}

Status* create_product(const CustomOperator*, const void* table, const KernelInfo* info, void** out) {
    const Api api(table);
    try {
        int64_t block_size = 0;
        check(api, api.call<GetIntAttribute>(info, kBlockSize, &block_size));
        const Tensor codes = constant_input(api, info, 1), scales = constant_input(api, info, 2);
        *out = new Product{api, QuantizedMatMul(codes, scales, block_size)};
        return nullptr;
    } catch (const std::exception& error) {
        return api.call<CreateStatus>(kFail, error.what());
    }
}

CustomOperator quantized_matmul_operator() {
    CustomOperator op = common_operator();
    op.name = [](const CustomOperator*) { return kQuantizedMatMul; };
    op.num_inputs = [](const CustomOperator*) -> size_t { return 3; };
    op.num_outputs = [](const CustomOperator*) -> size_t { return 1; };
    op.input_type = [](const CustomOperator*, size_t index) -> int32_t { return index == 1 ? kAnyType : kFloat; };
    op.create_kernel = create_product;
    op.destroy_kernel = [](void* kernel) { delete static_cast<Product*>(kernel); };
    op.compute = [](void* kernel, KernelContext* context) {
        return guarded<Product>(kernel, context,
                                [](const Call& call, const Product& own) { own.product.multiply(call); });
    };
    return op;
}

CustomOpDomain* make_domain(const Api& api) {
    static const CustomOperator operators[] = {chunk_attention_operator(), complex_ema_operator(),
                                               timestep_norm_operator()};
    static const CustomOperator product = quantized_matmul_operator();
    CustomOpDomain* domain = nullptr;
    check(api, api.call<CreateCustomOpDomain>(kOperatorDomain, &domain));
    for (const CustomOperator& op : operators)
        check(api, api.call<CustomOpDomainAdd>(domain, &op));
    // On other processors ONNX Runtime takes the function's body, and its own MatMulNBits.
    if (has_vnni()) check(api, api.call<CustomOpDomainAdd>(domain, &product));
    return domain;
}

/// The domain for all sessions of one ONNX Runtime, of which a process may have several: Python's package and that of
/// an application. It is never released: this library may be unloaded after the one that made it.
CustomOpDomain* domain_of(const void* table) {
    static std::mutex mutex;
    static std::map<const void*, CustomOpDomain*> domains;
    const std::lock_guard<std::mutex> lock(mutex);
    CustomOpDomain*& domain = domains[table];
    if (!domain) domain = make_domain(Api(table));
    return domain;
}

}  // namespace
}  // namespace megalodon::ort

extern "C" __attribute__((visibility("default"))) megalodon::ort::Status* RegisterCustomOps(
    megalodon::ort::SessionOptions* options, const megalodon::ort::ApiBase* base) {
    using namespace megalodon::ort;
    const void* table = base->get_api(kOperatorsVersion);
    if (!table) {
        const Api oldest(base->get_api(kFirstVersion));
        return oldest.call<CreateStatus>(kFail, "megalodon operators: ONNX Runtime 1.18 or later is needed");
    }
    const Api api(table);
    try {
        return api.call<AddCustomOpDomain>(options, domain_of(table));
    } catch (const std::exception& error) {
        return api.call<CreateStatus>(kFail, error.what());
    }
}
