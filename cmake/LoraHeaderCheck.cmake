# The target lora_headers: the public headers as translation units of their own, which shows that each stands alone and
# that none has a warning for those who include it without -isystem. Templates warn where they are used, so one unit more
# uses those of the layers.
#
# Headers of which a program with lora::compiled sees the declarations only are compiled once more, as it sees them.
#
# Nearly all of that time goes into LibTorch, so nothing is compiled that shows nothing new:
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

set(lora_header_units)
set(lora_header_units_of_modules)
set(lora_header_units_of_compiled)
set(lora_compiled_elsewhere)
foreach(path IN LISTS LORA_PUBLIC_HEADERS)
  file(STRINGS "${path}" code REGEX "^[^/#]")
  file(RELATIVE_PATH header "${PROJECT_SOURCE_DIR}/include/lora" "${path}")
  if(NOT code AND NOT header STREQUAL "version.hpp")
    continue()
  endif()
  file(STRINGS "${path}" bodies REGEX "^#if LORA_BODIES")
  if(bodies)
    list(APPEND lora_header_units_of_compiled "${header}")
  endif()
  lora_leading_includes("${header}" external first)
  list(APPEND lora_compiled_elsewhere ${first})
  set(of_modules ${external})
  list(FILTER of_modules INCLUDE REGEX
       "^torch/nn/(module|cloneable|modules/(activation|conv|embedding|linear|rnn|container/(modulelist|sequential)))\\.h$")
  if(of_modules)
    list(APPEND lora_header_units_of_modules "${header}")
  else()
    list(APPEND lora_header_units "${header}")
  endif()
endforeach()

add_custom_target(lora_headers)
list(REMOVE_ITEM lora_header_units "" ${lora_compiled_elsewhere})
list(REMOVE_ITEM lora_header_units_of_modules "" ${lora_compiled_elsewhere})
foreach(kind units units_of_modules units_of_compiled)
  list(TRANSFORM lora_header_${kind} PREPEND "${CMAKE_CURRENT_BINARY_DIR}/header_${kind}/" OUTPUT_VARIABLE units)
  list(TRANSFORM units APPEND .cpp)
  foreach(header unit IN ZIP_LISTS lora_header_${kind} units)
    file(CONFIGURE OUTPUT "${unit}" CONTENT "#include <lora/${header}>\n")
  endforeach()
  add_library(lora_header_${kind} OBJECT EXCLUDE_FROM_ALL ${units})
  target_link_libraries(lora_header_${kind} PRIVATE lora::lora)
  target_compile_options(lora_header_${kind} PRIVATE $<$<CONFIG:Release>:-O0>
    -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Werror)
  add_dependencies(lora_headers lora_header_${kind})
endforeach()
target_compile_definitions(lora_header_units_of_compiled PRIVATE LORA_COMPILED)
target_sources(lora_header_units_of_modules PRIVATE packaging/templates.cpp)
target_precompile_headers(lora_header_units_of_modules PRIVATE <torch/nn/module.h>)
