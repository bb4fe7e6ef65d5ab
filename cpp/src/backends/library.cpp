#include "library.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "logging.hpp"
#include "megalodon/error.hpp"

namespace megalodon::detail {

namespace {

namespace fs = std::filesystem;

// The library in a directory, by how its name begins; a file stands for itself.
std::string resolve(const std::string& chosen, const std::vector<std::string>& names) {
    std::error_code error;
    if (!fs::is_directory(chosen, error)) return chosen;
    std::vector<std::string> found;
    for (const auto& entry : fs::directory_iterator(chosen, error)) {
        const std::string file = entry.path().filename().string();
        for (const std::string& name : names) {
            if (file.rfind(name.substr(0, name.find(".so") + 3), 0) == 0) found.push_back(entry.path().string());
        }
    }
    return found.empty() ? chosen : *std::min_element(found.begin(), found.end());
}

std::string loader_message() {
    const char* text = ::dlerror();
    return text == nullptr ? "unknown reason" : text;
}

}  // namespace

Library Library::open(const std::string& path, const char* variable, const std::vector<std::string>& names,
                      const std::string& what_to_do) {
    const char* value = std::getenv(variable);
    std::string chosen = !path.empty() ? path : value != nullptr ? value : "";
    std::vector<std::string> candidates = names;
    if (!chosen.empty()) candidates = {resolve(chosen, names)};
    std::string reason;
    for (const std::string& candidate : candidates) {
        if (void* handle = ::dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL)) {
            log(LogLevel::info, "loaded " + candidate);
            return {handle, candidate};
        }
        if (reason.empty()) reason = loader_message();
    }
    throw Error(ErrorKind::missing_library, candidates.front() + " cannot be loaded (" + reason + "); " + what_to_do);
}

void* Library::symbol(const char* name) const {
    if (void* address = ::dlsym(handle_, name)) return address;
    throw Error(ErrorKind::missing_library, path_ + " has no " + name + ": it is another library than expected");
}

}  // namespace megalodon::detail
