#include "tests/operators.h"

#include <dlfcn.h>

#include <cmath>

#include "megalodon/megalodon.h"
#include "megalodon/state_layout.h"

namespace megalodon::tests {
namespace {

constexpr Tensor activation(const char* dims) {
    return {Kind::kActivation, dims};
}
constexpr Tensor float32(const char* dims) {
    return {Kind::kFloat32, dims};
}
constexpr Tensor int64(const char* dims) {
    return {Kind::kInt64, dims};
}

/// The C function `Function` of a library; a missing one ends the program with dlsym's null pointer.
template <typename Function>
Function* find(void* library, const char* name) {
    return reinterpret_cast<Function*>(dlsym(library, name));
}

int call_complex_ema(void* library, const Operator& op, const HostCall& call) {
    return find<decltype(mgd_complex_ema)>(library, "mgd_complex_ema")(
        MGD_FLOAT32, op.size('B'), op.size('T'), op.size('D'), op.size('N'), call.inputs[0], call.input<float>(1),
        call.input<int64_t>(2), call.input<float>(3), call.input<float>(4), call.input<float>(5), call.input<float>(6),
        call.outputs[0], call.output<float>(1), nullptr);
}

int call_timestep_norm(void* library, const Operator& op, const HostCall& call) {
    return find<decltype(mgd_timestep_norm)>(library, "mgd_timestep_norm")(
        MGD_FLOAT32, op.size('B'), op.size('T'), op.size('D'), op.size('G'), call.inputs[0], call.input<float>(1),
        call.input<int64_t>(2), call.input<float>(3), call.input<float>(4),
        static_cast<float>(call.fields.at(kEpsilon)), call.outputs[0], call.output<float>(1), call.workspace,
        call.workspace_bytes, nullptr);
}

Operator complex_ema() {
    return {
        kComplexEma,
        "plain",
        {activation("BTD"), float32("BDN2"), int64("B"), float32("DN"), float32("KDN2"), float32("DN2"), float32("D")},
        {activation("BTD"), float32("BDN2")},
        {},
        {{'B', 3}, {'T', 17}, {'D', 12}, {'N', 5}, {'K', 7}},
        call_complex_ema};
}

Operator timestep_norm() {
    return {kTimestepNorm,
            "plain",
            {activation("BTD"), float32("BG4"), int64("B"), float32("D"), float32("D")},
            {activation("BTD"), float32("BG4")},
            {{kEpsilon, true, kDefaultEpsilon, 0.25, {0.0, -1e-5, INFINITY, NAN}}},
            {{'B', 3}, {'T', 17}, {'D', 12}, {'G', 6}},  // T beyond what needs no workspace
            call_timestep_norm};
}

}  // namespace

const std::vector<Operator>& operators() {
    static const std::vector<Operator> all = {complex_ema(), timestep_norm()};
    return all;
}

}  // namespace megalodon::tests
