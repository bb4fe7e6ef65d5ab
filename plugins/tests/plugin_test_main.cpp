// plugin_test LIBRARY [--gtest_...]: every TensorRT plugin of libmegalodon.so or libmegalodon_emulated.so, without
// TensorRT. The emulated library runs its kernels as well, on host memory.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdio>

#include "tests/harness.h"

int main(int argc, char** argv) {
    auto& library = megalodon::tests::library();
    library.handle = argc > 1 ? dlopen(argv[1], RTLD_NOW) : nullptr;
    if (library.handle == nullptr) {
        std::printf("usage: plugin_test LIBRARY [--gtest_...] (%s)\n", argc > 1 ? dlerror() : "no library");
        return 2;
    }
    library.runs_on_host = dlsym(library.handle, "mgd_emulate_order") != nullptr;
    testing::InitGoogleTest(&argc, argv);
    return RUN_ALL_TESTS();
}
