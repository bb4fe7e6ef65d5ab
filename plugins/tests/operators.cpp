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

constexpr Tensor int8(const char* dims) {
    return {Kind::kInt8, dims};
}
constexpr Tensor float8(const char* dims) {
    return {Kind::kFloat8, dims};
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
        nullptr, call.outputs[0], call.output<float>(1), call.workspace, call.workspace_bytes, nullptr);
}

int call_timestep_norm(void* library, const Operator& op, const HostCall& call) {
    return find<decltype(mgd_timestep_norm)>(library, "mgd_timestep_norm")(
        MGD_FLOAT32, op.size('B'), op.size('T'), op.size('D'), op.size('G'), call.inputs[0], call.input<float>(1),
        call.input<int64_t>(2), call.input<float>(3), call.input<float>(4),
        static_cast<float>(call.fields.at(kEpsilon)), nullptr, call.outputs[0], call.output<float>(1), call.workspace,
        call.workspace_bytes, nullptr);
}

int call_chunk_attention(void* library, const Operator& op, const HostCall& call) {
    const bool is_scaled = call.inputs.size() > 6;
    const Kind past = op.inputs[3].kind;
    const int past_type = past == Kind::kInt8 ? MGD_INT8 : past == Kind::kFloat8 ? MGD_FLOAT8_E4M3 : MGD_FLOAT32;
    return find<decltype(mgd_chunk_attention)>(library, "mgd_chunk_attention")(
        MGD_FLOAT32, past_type, op.size('B'), op.size('H'), op.size('T'), op.size('S'), op.size('K'), op.size('V'),
        call.inputs[0], call.inputs[1], call.inputs[2], call.inputs[3], call.inputs[4], call.input<int64_t>(5),
        is_scaled ? call.input<float>(6) : nullptr, is_scaled ? call.input<float>(7) : nullptr,
        static_cast<int64_t>(call.fields.at(kChunkSize)), call.outputs[0], call.workspace, call.workspace_bytes,
        nullptr);
}

int call_norm_ema(void* library, const Operator& op, const HostCall& call) {
    return find<decltype(mgd_timestep_norm_complex_ema)>(library, "mgd_timestep_norm_complex_ema")(
        MGD_FLOAT32, op.size('B'), op.size('T'), op.size('D'), op.size('G'), op.size('N'), call.inputs[0],
        call.input<float>(1), call.input<int64_t>(2), call.input<float>(3), call.input<float>(4),
        static_cast<float>(call.fields.at(kEpsilon)), call.input<float>(5), call.input<float>(6), call.input<float>(7),
        call.input<float>(8), call.input<float>(9), call.outputs[0], call.output<float>(1), call.outputs[2],
        call.output<float>(3), call.workspace, call.workspace_bytes, nullptr);
}

Operator norm_ema(const char* variant, int64_t T) {
    return {kTimestepNormComplexEma,
            variant,
            {activation("BTD"), float32("BG4"), int64("B"), float32("D"), float32("D"), float32("BDN2"), float32("DN"),
             float32("KDN2"), float32("DN2"), float32("D")},
            {activation("BTD"), float32("BG4"), activation("BTD"), float32("BDN2")},
            {{kEpsilon, true, kDefaultEpsilon, 0.25, {0.0, -1e-5, INFINITY, NAN}}},
            {{'B', 3}, {'T', T}, {'D', 12}, {'G', 6}, {'N', 5}, {'K', 7}},
            call_norm_ema};
}

/// Memory of the activations' type, or of `stored` with scales.
Operator chunk_attention(const char* variant, Tensor (*stored)(const char*), int64_t T) {
    Operator op{
        kChunkAttention,
        variant,
        {activation("BHTK"), activation("BHTK"), activation("BHTV"), stored("BHSK"), stored("BHSV"), int64("B")},
        {activation("BHTV")},
        {{kChunkSize, false, NAN, 64, {0, -5}}},
        {{'B', 3}, {'H', 2}, {'T', T}, {'S', 40}, {'K', 8}, {'V', 12}},
        call_chunk_attention};
    if (stored("").kind != Kind::kActivation) op.inputs.insert(op.inputs.end(), 2, float32("BHS"));
    return op;
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
    static const std::vector<Operator> all = {complex_ema(),
                                              timestep_norm(),
                                              chunk_attention("plain", activation, 17),
                                              chunk_attention("oneToken", activation, 1),
                                              chunk_attention("int8", int8, 17),
                                              chunk_attention("float8", float8, 1),
                                              norm_ema("plain", 17),
                                              norm_ema("oneToken", 1)};
    return all;
}

}  // namespace megalodon::tests
