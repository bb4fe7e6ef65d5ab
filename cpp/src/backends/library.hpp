// Shared libraries that are found when the program runs.
#pragma once

#include <string>
#include <vector>

namespace megalodon::detail {

class Library {
 public:
    // The first that loads of: `path`, the variable's value, the names. A directory stands for the file in it whose
    // name begins like one of `names`. Throws Error (missing_library) ending with `what_to_do`.
    static Library open(const std::string& path, const char* variable, const std::vector<std::string>& names,
                        const std::string& what_to_do);

    template <typename Function>
    Function get(const char* name) const {
        return reinterpret_cast<Function>(symbol(name));
    }
    const std::string& path() const { return path_; }

 private:
    Library(void* handle, std::string path) : handle_(handle), path_(std::move(path)) {}
    void* symbol(const char* name) const;  // throws Error (missing_library)

    void* handle_;  // never closed: these libraries do not survive that
    std::string path_;
};

}  // namespace megalodon::detail
