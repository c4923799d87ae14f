# cmake -P includes.cmake: includes of the library run one way only. A header includes headers of its
# own line of the table below, or of an earlier line, and no chain of includes comes back to where it began.
cmake_minimum_required(VERSION 3.24)

# Lowest first. A line names folders and headers; of several that fit a header, the longest counts.
set(lines
  "version.hpp linkage.hpp"
  "system/"
  "fwd.hpp options.hpp"
  "files/"
  "weight/"
  "files/bitsandbytes.hpp"
  "selection/text.hpp selection/expression.hpp selection/patterns.hpp"
  "method/"
  "batch_rows.hpp dropout_avx512.hpp dropout.hpp shared_input.hpp product_run.hpp low_rank_linear.hpp functional.hpp \
site.hpp"
  "layers/"
  "model/"
  "config.hpp"
  "selection/"
  "intercept/"
  "adapter/"
  "adapters.hpp"
  "modules/"
  "attach.hpp combine.hpp extract.hpp quantize.hpp"
  "quantized_checkpoint.hpp"
  "train/"
  "peft/"
  "pool.hpp torchscript.hpp hot_swap.hpp"
  "lora.hpp")

# What a folder may include of the earlier lines, where that is not everything: a layer of this library knows no model.
set(only_modules/ version.hpp system/ options.hpp weight/ method/ batch_rows.hpp dropout.hpp shared_input.hpp
    product_run.hpp low_rank_linear.hpp functional.hpp site.hpp layers/ intercept/ adapter/merge.hpp)

# LibTorch's headers that include all the others; a user is to pay for little.
set(torch_as_a_whole torch/torch.h torch/all.h torch/extension.h)

# What the operating system brings, which system/ alone calls, in forms for each of them.
set(of_one_system "^(unistd|fcntl|dlfcn|pthread|windows|io|direct)\\.h$|^sys/")

# Whether an entry of the table, a folder or a header, fits a header.
function(fits entry header result)
  string(FIND "${header}" "${entry}" place)
  if(entry STREQUAL header OR (place EQUAL 0 AND entry MATCHES "/$"))
    set(${result} TRUE PARENT_SCOPE)
  else()
    set(${result} FALSE PARENT_SCOPE)
  endif()
endfunction()

# The number of a header's line, and the entry that fits; empty when none does.
function(find_line header number entry)
  set(longest "")
  set(found "")
  set(count 0)
  foreach(line IN LISTS lines)
    math(EXPR count "${count} + 1")
    string(REPLACE " " ";" entries "${line}")
    foreach(candidate IN LISTS entries)
      string(LENGTH "${candidate}" length)
      string(LENGTH "${longest}" most)
      fits("${candidate}" "${header}" does_fit)
      if(does_fit AND length GREATER most)
        set(longest "${candidate}")
        set(found ${count})
      endif()
    endforeach()
  endforeach()
  set(${number} "${found}" PARENT_SCOPE)
  set(${entry} "${longest}" PARENT_SCOPE)
endfunction()

set(violations)
macro(violation text)
  list(APPEND violations "${text}")
endmacro()

get_filename_component(folder "${CMAKE_CURRENT_LIST_DIR}/../../include/lora" ABSOLUTE)
file(GLOB_RECURSE headers RELATIVE "${folder}" "${folder}/*")
if(NOT headers)
  message(FATAL_ERROR "there are no headers under ${folder}")
endif()
foreach(header IN LISTS headers)
  find_line("${header}" line_of_${header} entry_of_${header})
  if(NOT line_of_${header})
    violation("${header} is not in the table")
  endif()
  set(includes_of_${header})
  file(STRINGS "${folder}/${header}" found REGEX "^[ \t]*#[ \t]*include")
  file(STRINGS "${folder}/${header}" calls REGEX "filesystem::remove_all\\(")
  if(calls)
    violation("${header} calls std::filesystem::remove_all; remove_folder of system/files.hpp says why not")
  endif()
  foreach(include IN LISTS found)
    string(REGEX REPLACE "^[ \t]*#[ \t]*include[ \t]*" "" include "${include}")
    if(include MATCHES "^<lora/([^>]+)>")
      list(APPEND includes_of_${header} "${CMAKE_MATCH_1}")
    elseif(NOT include MATCHES "^<([^>]+)>")
      violation("${header} -> ${include}: headers are named as <lora/...>")
    elseif(CMAKE_MATCH_1 IN_LIST torch_as_a_whole)
      violation("${header} -> <${CMAKE_MATCH_1}>: all of LibTorch")
    elseif(CMAKE_MATCH_1 MATCHES "${of_one_system}" AND NOT header MATCHES "^system/")
      violation("${header} -> ${include}: not on every system; system/files.hpp has the calls")
    endif()
  endforeach()
endforeach()

foreach(header IN LISTS headers)
  foreach(included IN LISTS includes_of_${header})
    set(arrow "${header} -> ${included}")
    if(NOT included IN_LIST headers)
      violation("${arrow}: there is no such header")
      continue()
    endif()
    set(mine "${line_of_${header}}")
    set(theirs "${line_of_${included}}")
    if(mine AND theirs AND theirs GREATER mine)
      violation("${arrow}: ${entry_of_${included}} comes after ${entry_of_${header}}")
    elseif(mine AND theirs AND theirs LESS mine AND DEFINED only_${entry_of_${header}})
      set(may FALSE)
      foreach(entry IN LISTS only_${entry_of_${header}})
        fits("${entry}" "${included}" does_fit)
        if(does_fit)
          set(may TRUE)
        endif()
      endforeach()
      if(NOT may)
        violation("${arrow}: not among what ${entry_of_${header}} may include")
      endif()
    endif()
  endforeach()
endforeach()

# Takes away the headers that include none of those that are left, and the next cycle where there are no such, until
# nothing is left.
set(left ${headers})
while(left)
  set(is_stuck TRUE)
  foreach(header IN LISTS left)
    set(next_of_${header})
    foreach(included IN LISTS includes_of_${header})
      if(included IN_LIST left)
        set(next_of_${header} "${included}")
      endif()
    endforeach()
    if(NOT next_of_${header})
      list(REMOVE_ITEM left "${header}")
      set(is_stuck FALSE)
    endif()
  endforeach()
  if(is_stuck)
    list(GET left 0 header)
    set(way)
    while(NOT header IN_LIST way)
      list(APPEND way "${header}")
      set(header "${next_of_${header}}")
    endwhile()
    list(FIND way "${header}" start)
    list(SUBLIST way ${start} -1 cycle)
    list(REMOVE_ITEM left ${cycle})
    list(JOIN cycle " -> " way)
    violation("${way} -> ${header}: a cycle")
  endif()
endwhile()

list(LENGTH headers count)
if(violations)
  list(LENGTH violations wrong)
  list(JOIN violations "\n  " violations)
  message(FATAL_ERROR "${wrong} faults in what ${count} headers include, by tests/packaging/includes.cmake:\n"
                      "  ${violations}\n")
endif()
message(STATUS "${count} headers include each other one way only")
