// Where TensorRT's plugin registry keeps its functions.
#pragma once

namespace megalodon {

/// Place of IPluginRegistry::registerCreator(IPluginCreatorInterface&, char const*) in the table of virtual functions.
/// TensorRT 10 still has the functions for IPluginV2 before it, TensorRT 11 and TensorRT-RTX (major version 1) do not.
/// The headers that we are compiled with fit one of them only, so the place is chosen by the version found at run time.
constexpr int register_creator_slot(int tensorrt_major) {
    return tensorrt_major == 10 ? 12 : 8;
}

}  // namespace megalodon
