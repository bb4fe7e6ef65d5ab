# libmegalodon_emulated: the same kernel sources and C interface on host memory, and the plugins where their headers are.

option(MEGALODON_SANITIZE "AddressSanitizer and UndefinedBehaviorSanitizer; each error ends the program" OFF)
if(MEGALODON_SANITIZE)
    add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1)
    add_link_options(-fsanitize=address,undefined)
endif()

set_source_files_properties(${KERNEL_SOURCES} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
megalodon_shared_library(megalodon_emulated ${C_API_SOURCES} emulation/cuda.cpp ${KERNEL_SOURCES})
target_compile_definitions(megalodon_emulated PRIVATE MEGALODON_EMULATE)

add_executable(emulation_check tests/emulation_check.cpp emulation/cuda.cpp)
target_compile_definitions(emulation_check PRIVATE MEGALODON_EMULATE)
target_compile_options(emulation_check PRIVATE -Wall -Wextra -Wno-unknown-pragmas)
target_include_directories(emulation_check PRIVATE include ${CMAKE_CURRENT_SOURCE_DIR})

if(EXISTS ${MEGALODON_TENSORRT_INCLUDE}/NvInferRuntime.h AND EXISTS ${MEGALODON_CUDA_INCLUDE}/cuda_runtime_api.h)
    target_sources(megalodon_emulated PRIVATE ${PLUGIN_SOURCES})
    target_include_directories(megalodon_emulated SYSTEM PRIVATE ${MEGALODON_TENSORRT_INCLUDE} ${MEGALODON_CUDA_INCLUDE})
    include(cmake/plugin_test.cmake)
endif()
