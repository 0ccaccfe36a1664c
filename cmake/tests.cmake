# C++ tests, one executable for every tests/cpp/*.cpp, with the CPU backend and without torch. What a test
# needs beyond that, it says in a .cmake file in a folder beside it.
enable_testing()
add_custom_target(fusedopt_tests)

# A library is linked after the objects of the test, in the order that cpu.cmake explains.
add_library(fusedopt_cpu_all STATIC EXCLUDE_FROM_ALL ${FUSEDOPT_CPU_OBJECTS})
if(FUSEDOPT_SANITIZE STREQUAL "thread")
  target_sources(fusedopt_cpu_all PRIVATE ${PROJECT_SOURCE_DIR}/tests/cpp/threads/openmp.cpp)
  set(openmp "")
else()
  set(openmp OpenMP::OpenMP_CXX)
endif()

file(GLOB test_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/tests/cpp/*.cpp)
foreach(source IN LISTS test_sources)
  get_filename_component(name ${source} NAME_WE)
  add_executable(${name} EXCLUDE_FROM_ALL ${source})
  target_link_libraries(${name} PRIVATE fusedopt_common fusedopt_cpu_all ${openmp})
  add_dependencies(fusedopt_tests ${name})
  add_test(NAME ${name} COMMAND ${name})
endforeach()

file(GLOB test_parts CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/tests/cpp/*/*.cmake)
foreach(part IN LISTS test_parts)
  include(${part})
endforeach()
