#include "backends.hpp"

namespace megalodon::detail {

std::unique_ptr<Engine> open_tensorrt(const Bundle&, const SessionOptions&) {
    throw Error(ErrorKind::missing_library, "todo");
}

}  // namespace megalodon::detail
