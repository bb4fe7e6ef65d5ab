// TensorRT behind an interface without its headers. tensorrt.cpp is compiled once for each of the two ABIs that there
// are: that of TensorRT 10, and that of TensorRT 11 and TensorRT-RTX.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "library.hpp"
#include "megalodon/engine.hpp"

struct CUstream_st;

namespace megalodon::detail {

// One way to run an engine: shapes and addresses that stay until they are bound anew.
class TensorRTContext {
 public:
    virtual ~TensorRTContext() = default;
    // Both throw Error (engine); `enqueue` puts a call on the stream.
    virtual void bind(const std::vector<TensorRef>& inputs, const std::vector<TensorRef>& outputs) = 0;
    virtual void enqueue(CUstream_st* stream) = 0;
    // An input of fixed shape, once. Throws Error (engine).
    virtual void bind_weight(const std::string& name, void* data) = 0;
};

// A deserialised engine, ready to run on the GPU whose context is current.
class TensorRT {
 public:
    virtual ~TensorRT() = default;
    virtual std::vector<std::string> tensor_names() const = 0;
    virtual std::uint64_t tensor_bytes(const std::string& name) const = 0;  // of an input of fixed shape
    virtual std::size_t scratch_bytes() const = 0;
    // `scratch`: memory of `scratch_bytes` on the GPU, which contexts that run one after the other may share.
    // `has_fixed_shapes`: it will be bound once and run often. Throws Error (engine).
    virtual std::unique_ptr<TensorRTContext> open_context(void* scratch, bool has_fixed_shapes) = 0;
};

struct TensorRTRequest {
    const Library& library;      // libnvinfer or libtensorrt_rtx
    std::string plugin_library;  // path of libmegalodon, "" for an engine without plugins
    const void* engine;          // serialised
    std::size_t engine_bytes;
    bool is_for_later_releases, has_streamed_weights;  // as engine.json says
    std::string where;                                 // the engine's file, for messages
};

// Throw Error (engine). Those whose headers were missing are not built.
std::unique_ptr<TensorRT> open_tensorrt_abi10(const TensorRTRequest& request);
std::unique_ptr<TensorRT> open_tensorrt_abi11(const TensorRTRequest& request);

}  // namespace megalodon::detail
