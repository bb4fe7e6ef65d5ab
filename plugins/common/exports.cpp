// The two functions by which TensorRT finds the plugins of a library that it loads (IPluginRegistry::loadLibrary).
#include "common/plugin.h"
#include "megalodon/megalodon.h"

extern "C" MGD_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static nvinfer1::IPluginCreatorInterface* const creators[] = {
        &megalodon::complex_ema_creator(), &megalodon::timestep_norm_creator(), &megalodon::chunk_attention_creator(),
        &megalodon::norm_ema_creator()};
    count = sizeof(creators) / sizeof(creators[0]);
    return creators;
}

/// TensorRT requires it. The argument's class has another layout in version 11 than in 10, so it is not used.
extern "C" MGD_API void setLoggerFinder(void*) {}
