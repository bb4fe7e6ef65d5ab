# libmegalodon: kernels for every GPU from Turing on, TensorRT plugins, C interface.

if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 87-real 89-real 90-real 100-real 103-real 110-real 120-real
        121-real 120-virtual)
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)

if(MEGALODON_TENSORRT AND NOT EXISTS ${MEGALODON_TENSORRT_INCLUDE}/NvInferRuntime.h)
    message(FATAL_ERROR "NvInferRuntime.h is not in MEGALODON_TENSORRT_INCLUDE = '${MEGALODON_TENSORRT_INCLUDE}'; "
        "-DMEGALODON_TENSORRT=OFF compiles the kernels alone")
endif()

megalodon_shared_library(megalodon ${C_API_SOURCES} ${KERNEL_SOURCES})
target_compile_options(megalodon PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra;--threads=2>")
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.9)
    target_compile_options(megalodon PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
endif()
target_link_directories(megalodon PRIVATE ${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT}/lib) # where the PyPI wheels have it
target_include_directories(megalodon SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})

include(GNUInstallDirs)
if(MEGALODON_TENSORRT)
    include(cmake/tensorrt.cmake)
endif()
install(TARGETS megalodon EXPORT megalodonConfig LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY include/megalodon DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
    PATTERN onnxruntime_api.h EXCLUDE) # for our own libraries
install(EXPORT megalodonConfig NAMESPACE megalodon:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/megalodon)
