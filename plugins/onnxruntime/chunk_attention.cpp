// ChunkAttention on the CPU: checks of a call, and which way it goes.

#include "onnxruntime/attention.h"
#include "onnxruntime/operators.h"

namespace megalodon::ort {
namespace {

constexpr size_t kScaleInputs = 6;  // inputs before the scales

Rows memory_rows(const Call& call, size_t index, size_t scale_index, int64_t heads, int64_t capacity, int64_t width) {
    const Tensor rows = call.input(index);
    Call::require(rows.size() == heads * capacity * width && rows.shape.size() == 4, "memory of B, H, S rows");
    if (rows.type == kFloat) return {rows.data, nullptr, kFloat, width};
    Call::require((rows.type == kInt8 || rows.type == kFloat8E4M3) && call.num_inputs() > scale_index,
                  "memory of float32, or int8 or float8 e4m3 with scales");
    const Tensor scales = call.input(scale_index);
    Call::require(scales.size() == heads * capacity, "a scale for each row");
    return {rows.data, scales.floats(), rows.type, width};
}

}  // namespace

void chunk_attention(const Call& call, int64_t chunk_size) {
    const Tensor q = call.input(0), k = call.input(1), v = call.input(2), past_key = call.input(3),
                 position = call.input(5);
    Call::require(q.shape.size() == 4 && v.shape.size() == 4 && past_key.shape.size() == 4,
                  "q, k, v and past of rank 4");
    const int64_t B = q.shape[0], H = q.shape[1], T = q.shape[2], dz = q.shape[3], dv = v.shape[3],
                  S = past_key.shape[2], heads = B * H;
    Call::require(
        dz > 0 && dv > 0 && chunk_size > 0 && k.shape == q.shape && v.size() == heads * T * dv && position.size() == B,
        "k like q, v [B, H, T, dv] and a position for each row");
    const Attention attention{q.floats(),
                              k.floats(),
                              v.floats(),
                              memory_rows(call, 3, kScaleInputs, heads, S, dz),
                              memory_rows(call, 4, kScaleInputs + 1, heads, S, dv),
                              position.integers(),
                              call.output(0, v.shape),
                              B,
                              H,
                              T,
                              S,
                              dz,
                              dv,
                              chunk_size};
    for (int64_t head = 0; head < heads; ++head)
        Call::require(attention.filled(head) >= 0 && attention.filled(head) <= S, "memory for all rows below position");
    if (T == 1) return attend_one_token(call, attention);
    attend_tokens(call, attention);
}

}  // namespace megalodon::ort
