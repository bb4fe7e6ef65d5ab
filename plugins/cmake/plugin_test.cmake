# plugin_test: drives the plugins of a library without TensorRT. GoogleTest is the system's, or built from its sources in
# /usr/src/googletest (Debian's packages libgtest-dev and googletest); where neither is, there is no such program.

if(CMAKE_CROSSCOMPILING)
    set(GTest_FOUND FALSE) # the system's is for this machine
else()
    find_package(GTest QUIET)
endif()
if(NOT GTest_FOUND AND EXISTS /usr/src/googletest/CMakeLists.txt)
    set(INSTALL_GTEST OFF)
    add_subdirectory(/usr/src/googletest googletest EXCLUDE_FROM_ALL SYSTEM)
    set(GTest_FOUND TRUE)
endif()
if(NOT GTest_FOUND)
    message(STATUS "GoogleTest was not found: plugin_test is not built")
    return()
endif()

add_executable(plugin_test tests/plugin_test_main.cpp tests/harness.cpp tests/operators.cpp tests/creators_test.cpp
    tests/calls_test.cpp tests/allocation_test.cpp)
target_link_libraries(plugin_test PRIVATE GTest::gtest ${CMAKE_DL_LIBS})
target_compile_options(plugin_test PRIVATE -Wall -Wextra)
target_include_directories(plugin_test PRIVATE include ${CMAKE_CURRENT_SOURCE_DIR})
target_include_directories(plugin_test SYSTEM PRIVATE ${MEGALODON_TENSORRT_INCLUDE} ${MEGALODON_CUDA_INCLUDE})
