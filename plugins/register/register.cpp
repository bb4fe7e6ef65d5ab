// libmegalodon_register: registers our plugins by being loaded, for tools that only dlopen a library (`polygraphy
// --plugins`). Where TensorRT itself loads libmegalodon (IPluginRegistry::loadLibrary, `trtexec --dynamicPlugins`) this
// library is not wanted: it would register everything twice.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "register/slots.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

constexpr const char* kPathVariable = "MEGALODON_TENSORRT_LIBRARY";

bool register_creator(void* registry, int major, nvinfer1::IPluginCreatorInterface& creator) {
    using RegisterCreator = bool (*)(void*, nvinfer1::IPluginCreatorInterface&, const char*);
    void** functions = *static_cast<void***>(registry);
    return reinterpret_cast<RegisterCreator>(functions[megalodon::register_creator_slot(major)])(registry, creator, "");
}

template <typename Function>
Function function_of(void* library, const char* name) {
    return reinterpret_cast<Function>(dlsym(library, name));
}

/// getInferLibVersion is major * 10000 + minor * 100 + patch, in TensorRT-RTX as well.
bool register_all(void* library) {
    const auto get_registry = function_of<void* (*)()>(library, "getPluginRegistry");
    const auto get_version = function_of<int32_t (*)()>(library, "getInferLibVersion");
    void* registry = get_registry != nullptr && get_version != nullptr ? get_registry() : nullptr;
    if (registry == nullptr) return false;
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* creators = getCreators(count);
    bool done = true;
    for (int32_t i = 0; i < count; ++i) {
        done = register_creator(registry, get_version() / 10000, *creators[i]) && done;
    }
    return done;
}

std::vector<std::string> library_names() {
    if (const char* path = std::getenv(kPathVariable)) return {path};
    const std::vector<std::string> rtx = {"libtensorrt_rtx.so.1", "libtensorrt_rtx.so"};
    const std::vector<std::string> full = {"libnvinfer.so.11", "libnvinfer.so.10"};
    const char* wants_rtx = std::getenv("POLYGRAPHY_USE_TENSORRT_RTX");
    std::vector<std::string> names = wants_rtx != nullptr && std::string(wants_rtx) == "1" ? rtx : full;
    const std::vector<std::string>& others = names == rtx ? full : rtx;
    names.insert(names.end(), others.begin(), others.end());
    return names;
}

/// The TensorRT that the process has loaded already, else the first that can be loaded.
void* find_tensorrt() {
    for (const int mode : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY}) {
        for (const std::string& name : library_names()) {
            if (void* library = dlopen(name.c_str(), mode)) return library;
        }
    }
    return nullptr;
}

__attribute__((constructor)) void register_when_loaded() noexcept {
    try {
        void* library = find_tensorrt();
        if (library == nullptr) {
            std::fprintf(stderr, "[megalodon] no TensorRT is loaded or on LD_LIBRARY_PATH; add its folder, or set %s\n",
                         kPathVariable);
        } else if (!register_all(library)) {
            std::fprintf(stderr, "[megalodon] TensorRT did not take the plugins; are they registered already?\n");
        }
    } catch (...) {
        std::fprintf(stderr, "[megalodon] the plugins could not be registered\n");
    }
}

}  // namespace
