// The library's one entry: ONNX Runtime calls it with the session's options, and finds both operators.

#include <exception>
#include <new>

#include "megalodon/state_layout.h"
#include "onnxruntime/operators.h"

namespace megalodon::ort {
namespace {

constexpr size_t kPositionInput = 2;  // of both operators

struct Kernel {
    Api api;
    float epsilon;
};

Status* create_kernel(const CustomOperator*, const void* table, const KernelInfo* info, void** out) {
    const Api api(table);
    auto* kernel = new (std::nothrow) Kernel{api, kDefaultEpsilon};
    if (!kernel) return api.call<CreateStatus>(kFail, "megalodon operator: out of memory");
    Status* missing = api.call<GetFloatAttribute>(info, kEpsilon, &kernel->epsilon);
    if (missing) api.call<ReleaseStatus>(missing);
    *out = kernel;
    return nullptr;
}

/// ONNX Runtime is a C interface: nothing is thrown through it.
template <typename Compute>
Status* guarded(void* data, KernelContext* context, const Compute& compute) {
    const auto& kernel = *static_cast<Kernel*>(data);
    try {
        compute(Call(kernel.api, context), kernel);
        return nullptr;
    } catch (const std::exception& error) {
        return kernel.api.call<CreateStatus>(kFail, error.what());
    }
}

CustomOperator common_operator() {
    CustomOperator op;
    op.create_kernel = create_kernel;
    op.destroy_kernel = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.execution_provider = [](const CustomOperator*) -> const char* { return nullptr; };  // the CPU
    op.input_type = [](const CustomOperator*, size_t index) -> int32_t {
        return index == kPositionInput ? kInt64 : kFloat;
    };
    op.output_type = [](const CustomOperator*, size_t) -> int32_t { return kFloat; };
    op.num_outputs = [](const CustomOperator*) -> size_t { return 2; };
    op.input_characteristic = op.output_characteristic = [](const CustomOperator*, size_t) { return 0; };  // required
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
    CustomOpDomain* domain = nullptr;
    if (Status* status = api.call<CreateCustomOpDomain>(megalodon::kOperatorDomain, &domain)) return status;
    static const CustomOperator operators[] = {complex_ema_operator(), timestep_norm_operator()};
    for (const CustomOperator& op : operators) {
        if (Status* status = api.call<CustomOpDomainAdd>(domain, &op)) return status;
    }
    return api.call<AddCustomOpDomain>(options, domain);
}
