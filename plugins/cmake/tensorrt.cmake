# The plugins of libmegalodon, and libmegalodon_register, which registers them by being loaded. The kernels are compiled
# in the same way with and without them.

set(TENSORRT_INCLUDES ${MEGALODON_TENSORRT_INCLUDE} ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})

add_library(megalodon_plugins OBJECT ${PLUGIN_SOURCES})
target_compile_options(megalodon_plugins PRIVATE -Wall -Wextra)
target_include_directories(megalodon_plugins PRIVATE ${CMAKE_CURRENT_SOURCE_DIR} ${CMAKE_CURRENT_SOURCE_DIR}/include)
target_include_directories(megalodon_plugins SYSTEM PRIVATE ${TENSORRT_INCLUDES})
target_sources(megalodon PRIVATE $<TARGET_OBJECTS:megalodon_plugins>)

add_library(megalodon_register SHARED register/register.cpp)
target_link_libraries(megalodon_register PRIVATE megalodon ${CMAKE_DL_LIBS})
target_compile_options(megalodon_register PRIVATE -Wall -Wextra)
target_link_options(megalodon_register PRIVATE -Wl,--version-script=${CMAKE_CURRENT_SOURCE_DIR}/register/exports.map)
target_include_directories(megalodon_register PRIVATE ${CMAKE_CURRENT_SOURCE_DIR})
target_include_directories(megalodon_register SYSTEM PRIVATE ${TENSORRT_INCLUDES})
set_target_properties(megalodon_register PROPERTIES BUILD_RPATH "$ORIGIN" INSTALL_RPATH "$ORIGIN")
install(TARGETS megalodon_register LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
