# The target lora_headers: the public headers as translation units of their own, which shows that each stands alone, and
# all of them as one more, which shows that none has a warning for those who include it without -isystem. Templates warn
# where they are used, so another unit uses those of the layers.
#
# Headers of which a program with lora::compiled sees the declarations only are compiled once more, as it sees them.
#
# Most take a compiler 15 to 50 seconds, so the test `headers` asks for the target lora_entry_headers only: those that
# users begin with, in one form, and all of them together in both. Nearly all of that time goes into LibTorch, so nothing
# is compiled that shows nothing new:
# - <torch/nn/module.h> comes precompiled where the compiler sees it before anything of lora in any case: the header, or
#   the first header of lora that it includes, includes it first.
# - A header that another one includes before all else is compiled alone there.
# - A header of nothing but includes stands alone if those do.

# lora_leading_includes(HEADER EXTERNAL FIRST): what of others the compiler sees before anything of lora, and the headers
# of lora that `HEADER` begins with. Names are those between < and >.
function(lora_leading_includes header external first)
  set(seen)
  set(began_with)
  file(STRINGS "${PROJECT_SOURCE_DIR}/include/lora/${header}" lines REGEX "^#include <")
  foreach(line IN LISTS lines)
    string(REGEX REPLACE "^#include <(.*)>.*$" "\\1" name "${line}")
    if(name MATCHES "^lora/(version|linkage)\\.hpp$")  # macros
      continue()
    endif()
    if(NOT name MATCHES "^lora/(.*)$")
      list(APPEND seen "${name}")
      continue()
    endif()
    set(other "${CMAKE_MATCH_1}")
    lora_leading_includes("${other}" of_other other_began_with)
    if(NOT seen)
      set(began_with "${other}" ${other_began_with})
    endif()
    list(APPEND seen ${of_other})
    break()
  endforeach()
  set(${external} "${seen}" PARENT_SCOPE)
  set(${first} "${began_with}" PARENT_SCOPE)
endfunction()

# lora_add_header_check(TARGET [BOTH_FORMS] HEADERS HEADER...): without BOTH_FORMS, headers whose bodies lora::compiled
# has are compiled in its form alone.
function(lora_add_header_check target)
  cmake_parse_arguments(PARSE_ARGV 1 check BOTH_FORMS "" HEADERS)
  set(units)
  set(units_of_modules)
  set(units_of_compiled)
  set(compiled_elsewhere)
  foreach(header IN LISTS check_HEADERS)
    set(path "${PROJECT_SOURCE_DIR}/include/lora/${header}")
    file(STRINGS "${path}" code REGEX "^[^/#]")
    if(NOT code AND NOT header STREQUAL "version.hpp")
      continue()
    endif()
    file(STRINGS "${path}" bodies REGEX "^#if LORA_BODIES")
    if(bodies)
      list(APPEND units_of_compiled "${header}")
      if(NOT check_BOTH_FORMS)
        continue()
      endif()
    endif()
    lora_leading_includes("${header}" external first)
    list(APPEND compiled_elsewhere ${first})
    set(of_modules ${external})
    list(FILTER of_modules INCLUDE REGEX
         "^torch/nn/(module|cloneable|modules/(activation|conv|embedding|linear|rnn|container/(modulelist|sequential)))\\.h$")
    if(of_modules)
      list(APPEND units_of_modules "${header}")
    else()
      list(APPEND units "${header}")
    endif()
  endforeach()
  list(REMOVE_ITEM units "" ${compiled_elsewhere})
  list(REMOVE_ITEM units_of_modules "" ${compiled_elsewhere})

  add_custom_target(${target})
  foreach(kind units units_of_modules units_of_compiled)
    set(folder "${CMAKE_CURRENT_BINARY_DIR}/${target}_${kind}")
    set(files)
    foreach(header IN LISTS ${kind})
      list(APPEND files "${folder}/${header}.cpp")
      file(CONFIGURE OUTPUT "${folder}/${header}.cpp" CONTENT "#include <lora/${header}>\n")
    endforeach()
    add_library(${target}_${kind} OBJECT EXCLUDE_FROM_ALL ${files})
    target_link_libraries(${target}_${kind} PRIVATE lora::lora)
    target_compile_options(${target}_${kind} PRIVATE $<$<CONFIG:Release>:-O0>
      -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Werror)
    add_dependencies(${target} ${target}_${kind})
  endforeach()
  target_compile_definitions(${target}_units_of_compiled PRIVATE LORA_COMPILED)
  target_sources(${target}_units PRIVATE "${CMAKE_CURRENT_BINARY_DIR}/every_header.cpp")
  target_sources(${target}_units_of_compiled PRIVATE "${CMAKE_CURRENT_BINARY_DIR}/every_header.cpp")
  target_sources(${target}_units_of_modules PRIVATE packaging/templates.cpp)
  target_precompile_headers(${target}_units_of_modules PRIVATE <torch/nn/module.h>)
endfunction()

set(lora_headers ${LORA_PUBLIC_HEADERS})
list(TRANSFORM lora_headers REPLACE "^.*/include/lora/" "")
list(JOIN lora_headers ">\n#include <lora/" includes)
file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/every_header.cpp" CONTENT "#include <lora/${includes}>\n")
lora_add_header_check(lora_headers BOTH_FORMS HEADERS ${lora_headers})

list(FILTER lora_headers INCLUDE REGEX "^((modules|train)/)?[^/]+$")
lora_add_header_check(lora_entry_headers HEADERS ${lora_headers})
