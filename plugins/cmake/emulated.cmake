# libmegalodon_emulated: the same kernel sources and C interface on host memory, and the plugins where their headers are.

set_source_files_properties(${KERNEL_SOURCES} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
megalodon_shared_library(megalodon_emulated c_api/c_api.cpp emulation/cuda.cpp ${KERNEL_SOURCES})
target_compile_definitions(megalodon_emulated PRIVATE MEGALODON_EMULATE)

if(EXISTS ${MEGALODON_TENSORRT_INCLUDE}/NvInferRuntime.h AND EXISTS ${MEGALODON_CUDA_INCLUDE}/cuda_runtime_api.h)
    target_sources(megalodon_emulated PRIVATE ${PLUGIN_SOURCES})
    target_include_directories(megalodon_emulated SYSTEM PRIVATE ${MEGALODON_TENSORRT_INCLUDE} ${MEGALODON_CUDA_INCLUDE})

    add_executable(plugin_check tests/plugin_check.cpp)
    target_link_libraries(plugin_check PRIVATE ${CMAKE_DL_LIBS})
    target_compile_options(plugin_check PRIVATE -Wall -Wextra)
    target_include_directories(plugin_check PRIVATE include)
    target_include_directories(plugin_check SYSTEM PRIVATE ${MEGALODON_TENSORRT_INCLUDE} ${MEGALODON_CUDA_INCLUDE})
endif()
