#include "backends.hpp"

namespace megalodon::detail {

std::unique_ptr<Engine> open_tensorrt(const Bundle&, const SessionOptions&) {
    throw Error(ErrorKind::missing_library,
                "this libmegalodon_runtime was built without TensorRT's headers: set TENSORRT_ROOT and build it again, "
                "or use the "
                "backend onnxruntime");
}

}  // namespace megalodon::detail
