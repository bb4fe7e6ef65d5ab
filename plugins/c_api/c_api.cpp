#include "common/launch.h"
#include "megalodon/megalodon.h"

int32_t mgd_abi_version(void) {
    return MGD_ABI_VERSION;
}

const char* mgd_status_string(int status) {
    switch (status) {
        case MGD_OK:
            return "success";
        case MGD_INVALID_ARGUMENT:
            return "invalid argument: a size, type or pointer that no call can have";
        case MGD_UNSUPPORTED:
            return "unsupported: more modes, wider heads or more rows than the kernels take";
        case MGD_INTERNAL_ERROR:
            return "internal error in libmegalodon";
        default:
            return status > MGD_CUDA_ERROR ? megalodon::cuda_error_string(status - MGD_CUDA_ERROR) : "unknown status";
    }
}
