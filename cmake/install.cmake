# What is installed: the library, its headers, a CMake package and a pkg-config file, under one prefix that can be moved.
# For C and C++ the prefix is the user's (cmake --install build --prefix DIR); for Python it is the package's folder.
include(CMakePackageConfigHelpers)
set(lib_dir lib)
set(include_dir include)
set(package_dir ${lib_dir}/cmake/diffusionz)

# LibTorch is found beside the Python package first, so that a moved environment works, then where it was at build time.
set_target_properties(diffusionz PROPERTIES INSTALL_RPATH "$ORIGIN/../../torch/lib;${torch_lib}")
if(SKBUILD)
  # A wheel cannot hold symbolic links: one file without a version in its name instead of three copies.
  set_property(TARGET diffusionz PROPERTY VERSION)
  set_property(TARGET diffusionz PROPERTY SOVERSION)
endif()

install(TARGETS diffusionz EXPORT diffusionz LIBRARY DESTINATION ${lib_dir} COMPONENT library)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/diffusionz/include/ DESTINATION ${include_dir} COMPONENT library)

install(EXPORT diffusionz NAMESPACE diffusionz:: FILE diffusionzTargets.cmake DESTINATION ${package_dir} COMPONENT library)
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/diffusionzConfig.cmake.in
  ${PROJECT_BINARY_DIR}/package/diffusionzConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/package/diffusionzConfigVersion.cmake COMPATIBILITY SameMinorVersion)
configure_file(${CMAKE_CURRENT_LIST_DIR}/diffusionz.pc.in ${PROJECT_BINARY_DIR}/package/diffusionz.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/package/diffusionzConfig.cmake ${PROJECT_BINARY_DIR}/package/diffusionzConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT library)
install(FILES ${PROJECT_BINARY_DIR}/package/diffusionz.pc DESTINATION ${lib_dir}/pkgconfig COMPONENT library)
