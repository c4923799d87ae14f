# cmake -DOUT=FILE -DFOLDER=DIR "-DFILES=A:B:..." -P batch.cmake: writes one translation unit of several test files, which
# are named from the folder. Each keeps a namespace of its own, so their helpers may share names. What they include is
# included before that; inside of the namespaces every header is then a header that was included already.
string(REPLACE ":" ";" files "${FILES}")
set(includes)
set(bodies)
foreach(file IN LISTS files)
  get_filename_component(folder "${FOLDER}/${file}" DIRECTORY)
  file(STRINGS "${FOLDER}/${file}" others REGEX "^namespace (lora|testing|torch|at|c10|std|Catch|gpt)[^A-Za-z_]")
  if(others)
    message(FATAL_ERROR "lora: tests/${file} opens the namespace of something else: ${others}. A test file is compiled \
inside a namespace of its own, so that has to be in a header, as in tests/support.")
  endif()
  file(STRINGS "${FOLDER}/${file}" lines REGEX "^#include ")
  foreach(line IN LISTS lines)
    if(line MATCHES "\"(.+)\"")
      get_filename_component(path "${folder}/${CMAKE_MATCH_1}" ABSOLUTE)
      if(EXISTS "${path}")  # beside the file, where the batch is not
        set(line "#include \"${path}\"")
      endif()
    endif()
    list(APPEND includes "${line}")
  endforeach()
  string(MAKE_C_IDENTIFIER "${file}" name)
  string(APPEND bodies "\nnamespace ${name} {\n#include \"${FOLDER}/${file}\"\n}\n")
endforeach()
list(REMOVE_DUPLICATES includes)
list(JOIN includes "\n" includes)
# LibTorch before Catch2, whatever a file begins with. Left alone when it is the same already.
file(CONFIGURE OUTPUT "${OUT}" CONTENT "#include \"support/testing.hpp\"\n${includes}\n${bodies}" @ONLY)
