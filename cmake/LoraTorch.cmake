# Finds LibTorch and leaves the imported target `torch`, visible in every directory. The build reads this file, and so
# does find_package(lora), beside whose configuration it is installed. The ways are tried in this order:
#
#   1. a target `torch` that exists already;
#   2. find_package(Torch): Torch_DIR, CMAKE_PREFIX_PATH, the system's own;
#   3. the package `torch` of the Python that LORA_PYTHON names, else of python3 on the PATH,
#      else of LORA_CHECKOUT_PYTHON (the virtual environment of this checkout, set by the build only).
#
# TorchConfig.cmake stops the whole configuration when LibTorch was built for CUDA and this machine lacks a CUDA toolkit
# that it likes, although compiling and linking need none. So for a CUDA build a trial decides, once and in a project
# of its own; where it fails, `torch` is an imported target of ours with the same libraries.
#
# Result: the target `torch`, LORA_TORCH_PREFIX (the folder with include/ and lib/), LORA_TORCH_STANDARD (the C++ that its
# headers need) and one line that says what was found; or LORA_TORCH_ERROR, which says what was tried and what to do.

set(LORA_PYTHON "" CACHE FILEPATH "Python whose package torch is used where find_package(Torch) finds none")
option(LORA_ANY_LIBTORCH "Whether a LibTorch is taken that lora was not tested with" OFF)

# Tested by tests/libtorch_versions.sh: the oldest, the newest, and every minor version between them.
set(LORA_TORCH_OLDEST 2.6)
set(LORA_TORCH_NEWEST 2.14)

# Whether that version is taken: one between the oldest and the newest, or any, by LORA_ANY_LIBTORCH.
function(lora_takes_torch version result)
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" minor "${version}")
  if(LORA_ANY_LIBTORCH OR (minor VERSION_GREATER_EQUAL LORA_TORCH_OLDEST AND minor VERSION_LESS_EQUAL LORA_TORCH_NEWEST))
    set(${result} TRUE PARENT_SCOPE)
  else()
    set(${result} FALSE PARENT_SCOPE)
  endif()
endfunction()

# The version that the headers under `prefix` state, or "unknown".
function(lora_torch_version prefix result)
  set(version)
  foreach(header include/torch/headeronly/version.h include/torch/csrc/api/include/torch/version.h)
    if(NOT version AND EXISTS "${prefix}/${header}")
      file(STRINGS "${prefix}/${header}" lines REGEX "define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
      string(REGEX REPLACE "[^;]*TORCH_VERSION_[A-Z]+ +([0-9]+)[^;]*" "\\1" version "${lines}")
      string(REPLACE ";" "." version "${version}")
    endif()
  endforeach()
  if(NOT version)
    set(version unknown)
  endif()
  set(${result} "${version}" PARENT_SCOPE)
endfunction()

# The C++ standard that the headers under `prefix` ask for: 17, from LibTorch 2.14 on 20.
function(lora_torch_standard prefix result)
  set(standard 17)
  set(header "${prefix}/include/torch/csrc/api/include/torch/all.h")
  if(EXISTS "${header}")
    file(STRINGS "${header}" line REGEX "C\\+\\+[0-9]+ or later")
    if(line MATCHES "C\\+\\+([0-9]+) or later" AND CMAKE_MATCH_1 GREATER standard)
      set(standard "${CMAKE_MATCH_1}")
    endif()
  endif()
  set(${result} "${standard}" PARENT_SCOPE)
endfunction()

# The folder of the TorchConfig.cmake that find_package(Torch) would read, or "". No version satisfies the request, so
# every package in reach is listed and none is read: reading one can stop the configuration.
function(lora_list_torch_packages result)
  set(named "${Torch_DIR}")
  find_package(Torch 99999 CONFIG QUIET)
  if(named)
    set(Torch_DIR "${named}" CACHE PATH "The folder of TorchConfig.cmake" FORCE)
  else()
    unset(Torch_DIR CACHE)
  endif()
  set(found)
  foreach(config version IN ZIP_LISTS Torch_CONSIDERED_CONFIGS Torch_CONSIDERED_VERSIONS)
    lora_takes_torch("${version}" is_taken)
    if(NOT found AND is_taken)
      get_filename_component(found "${config}" DIRECTORY)
    elseif(NOT found)
      message(STATUS "lora: passing over LibTorch ${version} in ${config}: ${LORA_TORCH_RANGE}")
    endif()
  endforeach()
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

# The folder of TorchConfig.cmake in the package `torch` of a Python, or "". The package is located, not imported.
function(lora_ask_python python result)
  set(question "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')")
  execute_process(COMMAND "${python}" -c "${question}" OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE
                  ERROR_QUIET RESULT_VARIABLE status)
  set(config "${folder}/share/cmake/Torch")
  if(status EQUAL 0 AND folder AND EXISTS "${config}/TorchConfig.cmake")
    set(${result} "${config}" PARENT_SCOPE)
  else()
    set(${result} "" PARENT_SCOPE)
  endif()
endfunction()

# Ways 2 and 3: the folder of TorchConfig.cmake and how it was found, or "".
function(lora_locate_torch config how)
  lora_list_torch_packages(folder)
  set(way "find_package(Torch)")
  set(pythons "${LORA_PYTHON}")
  if(NOT LORA_PYTHON)
    find_program(LORA_PYTHON_ON_PATH NAMES python3 python NO_CACHE)
    set(pythons ${LORA_PYTHON_ON_PATH} ${LORA_CHECKOUT_PYTHON})
  endif()
  foreach(python IN LISTS pythons)
    if(NOT folder AND python)
      lora_ask_python("${python}" folder)
      set(way "the package torch of ${python}")
    endif()
  endforeach()
  set(${config} "${folder}" PARENT_SCOPE)
  set(${how} "${way}" PARENT_SCOPE)
  list(JOIN pythons ", " pythons)
  set(LORA_TORCH_PYTHONS "${pythons}" PARENT_SCOPE)
endfunction()

# Whether find_package(Torch) with this TorchConfig.cmake gets through here; asked once for each folder.
function(lora_try_torch config result)
  if(NOT LORA_TORCH_TRIED STREQUAL config)
    set(trial "${CMAKE_BINARY_DIR}/lora_try_torch")
    file(WRITE "${trial}/trial.cpp" "")
    file(WRITE "${trial}/CMakeLists.txt" "cmake_minimum_required(VERSION 3.24)
project(trial LANGUAGES CXX)
find_package(Torch REQUIRED CONFIG PATHS \"${config}\" NO_DEFAULT_PATH)
add_executable(trial trial.cpp)
target_link_libraries(trial PRIVATE torch)
")
    set(settings)
    foreach(name CMAKE_BUILD_TYPE CMAKE_MAKE_PROGRAM CMAKE_CXX_COMPILER CMAKE_CUDA_COMPILER CMAKE_TOOLCHAIN_FILE
                 CMAKE_PREFIX_PATH CMAKE_IGNORE_PATH CMAKE_IGNORE_PREFIX_PATH CUDAToolkit_ROOT CUDA_TOOLKIT_ROOT_DIR
                 TORCH_CUDA_ARCH_LIST)
      if(${name})
        list(APPEND settings "-D${name}=${${name}}")
      endif()
    endforeach()
    execute_process(COMMAND "${CMAKE_COMMAND}" -S "${trial}" -B "${trial}/build" -G "${CMAKE_GENERATOR}" ${settings}
                    RESULT_VARIABLE status OUTPUT_FILE "${trial}/log" ERROR_FILE "${trial}/log")
    file(REMOVE_RECURSE "${trial}/build")
    if(status EQUAL 0)
      set(works TRUE)
    else()
      set(works FALSE)
    endif()
    set(LORA_TORCH_TRIED "${config}" CACHE INTERNAL "The LibTorch that was tried")
    set(LORA_TORCH_WORKS "${works}" CACHE INTERNAL "Whether find_package(Torch) gets through with it")
  endif()
  set(${result} "${LORA_TORCH_WORKS}" PARENT_SCOPE)
endfunction()

# The target `torch` without TorchConfig.cmake. The linker must keep libraries that no symbol asks for: libtorch_cuda
# adds the CUDA kernels to the dispatcher when it is loaded.
function(lora_import_torch prefix)
  set(libraries)
  foreach(name torch torch_cpu torch_cuda c10 c10_cuda)
    if(EXISTS "${prefix}/lib/lib${name}.so")
      string(APPEND libraries " \"${prefix}/lib/lib${name}.so\"")
    endif()
  endforeach()
  add_library(torch SHARED IMPORTED GLOBAL)
  set_target_properties(torch PROPERTIES
    IMPORTED_LOCATION "${prefix}/lib/libtorch.so"
    INTERFACE_INCLUDE_DIRECTORIES "${prefix}/include;${prefix}/include/torch/csrc/api/include"
    INTERFACE_COMPILE_DEFINITIONS "USE_DISTRIBUTED;USE_C10D_GLOO;USE_RPC;USE_TENSORPIPE"
    INTERFACE_LINK_LIBRARIES "-Wl,--no-as-needed${libraries} -Wl,--as-needed")
  # Older wheels were compiled with the C++ library's old string; only TorchConfig.cmake says so.
  file(STRINGS "${prefix}/share/cmake/Torch/TorchConfig.cmake" abi REGEX "D_GLIBCXX_USE_CXX11_ABI=[01]")
  if(abi MATCHES "D_GLIBCXX_USE_CXX11_ABI=([01])")
    set_property(TARGET torch APPEND PROPERTY INTERFACE_COMPILE_DEFINITIONS "_GLIBCXX_USE_CXX11_ABI=${CMAKE_MATCH_1}")
  endif()
endfunction()

# Include folders of the target `torch` -> the prefix above them.
function(lora_torch_target_prefix result)
  get_target_property(folders torch INTERFACE_INCLUDE_DIRECTORIES)
  set(prefix)
  foreach(folder IN LISTS folders)
    if(NOT prefix AND EXISTS "${folder}/c10/core/TensorImpl.h")
      get_filename_component(prefix "${folder}" DIRECTORY)
    endif()
  endforeach()
  set(${result} "${prefix}" PARENT_SCOPE)
endfunction()

set(LORA_TORCH_RANGE "lora was tested with ${LORA_TORCH_OLDEST} to ${LORA_TORCH_NEWEST}; \
-DLORA_ANY_LIBTORCH=ON takes another all the same")
set(LORA_TORCH_ERROR)
if(TARGET torch)
  set(lora_torch_how "the target torch that exists already")
  lora_torch_target_prefix(LORA_TORCH_PREFIX)
else()
  lora_locate_torch(lora_torch_config lora_torch_how)
  if(NOT lora_torch_config)
    set(LORA_TORCH_ERROR "lora: LibTorch ${LORA_TORCH_OLDEST} to ${LORA_TORCH_NEWEST} was not found: neither a target \
torch, nor find_package(Torch), nor the package torch of a Python (asked: ${LORA_TORCH_PYTHONS}). Set LORA_PYTHON to a Python that has torch, or CMAKE_PREFIX_PATH to a LibTorch.")
    return()
  endif()
  get_filename_component(LORA_TORCH_PREFIX "${lora_torch_config}/../../.." ABSOLUTE)
endif()

lora_torch_version("${LORA_TORCH_PREFIX}" LORA_TORCH_VERSION)
lora_takes_torch("${LORA_TORCH_VERSION}" lora_torch_is_taken)
if(NOT lora_torch_is_taken)
  set(LORA_TORCH_ERROR "lora: LibTorch ${LORA_TORCH_VERSION} in ${LORA_TORCH_PREFIX}, by ${lora_torch_how}, is not \
taken: ${LORA_TORCH_RANGE}.")
  return()
endif()

if(NOT TARGET torch)
  set(lora_torch_works TRUE)
  if(EXISTS "${LORA_TORCH_PREFIX}/lib/libtorch_cuda.so")
    lora_try_torch("${lora_torch_config}" lora_torch_works)
  endif()
  if(lora_torch_works)
    # Its warnings are about static libraries that a shared LibTorch has no use for.
    set(lora_message_level "${CMAKE_MESSAGE_LOG_LEVEL}")
    set(lora_torch_named "${Torch_DIR}")
    set(CMAKE_MESSAGE_LOG_LEVEL ERROR)
    find_package(Torch REQUIRED GLOBAL CONFIG PATHS "${lora_torch_config}" NO_DEFAULT_PATH)
    set(CMAKE_MESSAGE_LOG_LEVEL "${lora_message_level}")
    if(NOT lora_torch_named)  # so that the next configuration looks again, e.g. after a change of LORA_PYTHON
      unset(Torch_DIR CACHE)
    endif()
  else()
    lora_import_torch("${LORA_TORCH_PREFIX}")
    string(APPEND lora_torch_how ", with targets of lora's own since find_package(Torch) stops on this machine")
  endif()
endif()

# TorchConfig.cmake does not pass on what standard the headers need.
lora_torch_standard("${LORA_TORCH_PREFIX}" LORA_TORCH_STANDARD)
get_target_property(lora_torch_target torch ALIASED_TARGET)
if(NOT lora_torch_target)
  set(lora_torch_target torch)
endif()
set_property(TARGET ${lora_torch_target} APPEND PROPERTY INTERFACE_COMPILE_FEATURES cxx_std_${LORA_TORCH_STANDARD})

# LibTorch as programs are linked with it. Its CUDA wheels export parts of std::filesystem, in two versions that do not
# fit each other: a program that calls remove_all would crash. Where the C++ library comes before them, everybody's calls
# go there. It is named by its file, for there are compilers that find the static one by its short name, of which nothing
# is taken before a program's own files.
if(NOT TARGET lora::torch)
  add_library(lora::torch INTERFACE IMPORTED GLOBAL)
  set_property(TARGET lora::torch PROPERTY INTERFACE_LINK_LIBRARIES torch)
  set(lora_torch_files)
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND EXISTS "${LORA_TORCH_PREFIX}/lib/libtorch.so")
    file(STRINGS "${LORA_TORCH_PREFIX}/lib/libtorch.so" lora_torch_files LIMIT_COUNT 1
         REGEX "^_ZNSt10filesystem10remove_all")
  endif()
  if(lora_torch_files)
    include(CheckLinkerFlag)
    set(lora_torch_first "LINKER:--push-state,--no-as-needed,-l:libstdc++.so.6,--pop-state")
    check_linker_flag(CXX "${lora_torch_first}" LORA_TORCH_NAMES_LIBSTDCXX)
    if(NOT LORA_TORCH_NAMES_LIBSTDCXX)
      set(lora_torch_first "LINKER:--push-state,--no-as-needed,-lstdc++,--pop-state")
    endif()
    set_property(TARGET lora::torch PROPERTY INTERFACE_LINK_OPTIONS "${lora_torch_first}")
  endif()
endif()

set(lora_torch_device CPU)
if(EXISTS "${LORA_TORCH_PREFIX}/lib/libtorch_cuda.so")
  set(lora_torch_device CUDA)
endif()
message(STATUS
  "lora: LibTorch ${LORA_TORCH_VERSION} (${lora_torch_device}, C++${LORA_TORCH_STANDARD}) in ${LORA_TORCH_PREFIX}, by ${lora_torch_how}")
