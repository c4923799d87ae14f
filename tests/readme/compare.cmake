# cmake -DPROGRAM=... -DFOLDER=... -P compare.cmake: runs the program in the folder; it has to print readme.text.
execute_process(COMMAND "${PROGRAM}" WORKING_DIRECTORY "${FOLDER}" OUTPUT_VARIABLE printed RESULT_VARIABLE status)
file(READ "${FOLDER}/readme.text" expected)
if(NOT status EQUAL 0 OR NOT printed STREQUAL expected)
  message(FATAL_ERROR "status ${status}; README.md says the program prints\n${expected}but it printed\n${printed}")
endif()
