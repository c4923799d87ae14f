# cmake --install puts the headers under include/lora and the package under share/cmake/lora.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

set(lora_package_folder "${CMAKE_INSTALL_DATADIR}/cmake/lora")
install(TARGETS lora EXPORT lora-targets FILE_SET HEADERS FILE_SET details)
install(EXPORT lora-targets NAMESPACE lora:: DESTINATION "${lora_package_folder}")
configure_package_config_file(cmake/lora-config.cmake.in "${PROJECT_BINARY_DIR}/lora-config.cmake"
                              INSTALL_DESTINATION "${lora_package_folder}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/lora-config-version.cmake"
                                 COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/lora-config.cmake" "${PROJECT_BINARY_DIR}/lora-config-version.cmake"
              cmake/LoraTorch.cmake cmake/LoraDependencies.cmake cmake/LoraCompiled.cmake cmake/lora_compiled.cpp
        DESTINATION "${lora_package_folder}")
