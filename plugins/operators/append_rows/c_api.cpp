#include <algorithm>

#include "c_api/checks.h"
#include "operators/append_rows/launch.h"

namespace {

bool is_possible(const mgd_append& tensor, int64_t S) {
    if (tensor.heads < 0 || tensor.row_bytes < 0) return false;
    if (tensor.heads == 0 || tensor.row_bytes == 0) return true;
    return tensor.rows != nullptr && (S == 0 || tensor.memory != nullptr) && tensor.rows != tensor.memory;
}

}  // namespace

int mgd_append_rows(const mgd_append* tensors, int64_t count, int64_t B, int64_t T, int64_t S, int64_t C,
                    const int64_t* position, void* stream) {
    return megalodon::without_exceptions([&]() -> int {
        if (!megalodon::none_negative(count, B, T, S) || C < 1) return MGD_INVALID_ARGUMENT;
        if (count == 0 || B == 0 || T == 0) return MGD_OK;
        if (!megalodon::none_null(tensors) || position == nullptr) return MGD_INVALID_ARGUMENT;
        for (int64_t i = 0; i < count; ++i) {
            if (!is_possible(tensors[i], S)) return MGD_INVALID_ARGUMENT;
        }
        for (int64_t first = 0; first < count; first += MGD_APPEND_TENSORS) {
            megalodon::AppendCall call{};
            call.num_tensors = static_cast<int>(std::min<int64_t>(count - first, MGD_APPEND_TENSORS));
            std::copy_n(tensors + first, call.num_tensors, call.tensors);
            call.B = B, call.T = T, call.S = S, call.chunk_size = C, call.position = position;
            if (int status = megalodon::launch_append_rows(call, stream)) return status;
        }
        return MGD_OK;
    });
}
