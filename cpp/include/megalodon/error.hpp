// What every function of the library throws, and nothing else: one line that says what is wrong and what to do.
#pragma once

#include <stdexcept>
#include <string>

#if defined(__GNUC__)
#define MEGALODON_API __attribute__((visibility("default")))
#else
#define MEGALODON_API
#endif

namespace megalodon {

// The numbers are the C interface's status codes.
enum class ErrorKind : int {
    invalid_argument = 1,  // a value that makes no sense, such as a token outside the vocabulary
    bundle = 2,            // a bundle that is incomplete, damaged or of another format version
    state = 3,             // a saved stream of another bundle, a damaged one, or a stream that went non-finite
    engine = 4,            // an engine or a model that cannot run on this machine
    missing_library = 5,   // ONNX Runtime, TensorRT, a GPU driver or the plugin library was not found
    io = 6,                // a file that cannot be read or written
    internal = 7,          // a bug of ours, or no memory
};

class MEGALODON_API Error : public std::runtime_error {
 public:
    Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
    ErrorKind kind() const noexcept { return kind_; }

 private:
    ErrorKind kind_;
};

}  // namespace megalodon
