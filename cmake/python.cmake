# The Python binding: a cffi extension generated from the headers, installed beside the Python sources.
# Only where scikit-build-core builds the package: a build for C needs no cffi.
if(NOT SKBUILD)
  return()
endif()

set(headers ${PROJECT_SOURCE_DIR}/diffusionz/include/diffusionz_c_api.h ${PROJECT_SOURCE_DIR}/diffusionz/include/chronos_c_api.h)
set(binding ${PROJECT_BINARY_DIR}/_diffusionz.c)
add_custom_command(OUTPUT ${binding}
  COMMAND ${Python3_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/make_binding.py ${headers} ${binding}
  DEPENDS ${headers} ${PROJECT_SOURCE_DIR}/cmake/make_binding.py
  COMMENT "Generating the Python binding from the C headers" VERBATIM)
add_library(diffusionz_python MODULE ${binding})
target_include_directories(diffusionz_python PRIVATE ${Python3_INCLUDE_DIRS})
target_link_libraries(diffusionz_python PRIVATE diffusionz)
# cffi keeps to Python's stable ABI, so one file serves every Python from 3.10 on. The symbol that Python looks up is
# exported by its own macro, whatever the default visibility is.
target_compile_definitions(diffusionz_python PRIVATE Py_LIMITED_API=0x030a0000)
set_target_properties(diffusionz_python PROPERTIES
  PREFIX "" OUTPUT_NAME _diffusionz SUFFIX .abi3.so
  BUILD_RPATH ${PROJECT_BINARY_DIR} INSTALL_RPATH "$ORIGIN/lib")
install(TARGETS diffusionz_python LIBRARY DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
