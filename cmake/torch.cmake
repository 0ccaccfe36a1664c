# csrc/python: the only part that sees torch and Python. It uses the pybind11 that torch was built with,
# whose headers come inside torch: its casters for torch's types are written against that one.
# Result: the object library fusedopt_python, FUSEDOPT_TORCH_LIBRARIES.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)

set(torch_query
    "import torch, torch.utils.cpp_extension as extension
print(*extension.include_paths(), sep=';')
print(*extension.library_paths(), sep=';')
print(int(torch.compiled_with_cxx11_abi()))")
execute_process(
  COMMAND ${Python_EXECUTABLE} -c "${torch_query}"
  OUTPUT_VARIABLE torch_answer
  ERROR_VARIABLE torch_error
  RESULT_VARIABLE torch_status
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch_status EQUAL 0)
  message(FATAL_ERROR "${Python_EXECUTABLE} cannot import torch: ${torch_error}")
endif()
string(REGEX MATCH "^([^\n]*)\n([^\n]*)\n([^\n]*)$" torch_answer "${torch_answer}")
set(torch_include_dirs ${CMAKE_MATCH_1})
set(torch_library_dirs ${CMAKE_MATCH_2})
set(torch_cxx11_abi ${CMAKE_MATCH_3})

set(FUSEDOPT_TORCH_LIBRARIES "")
foreach(name IN ITEMS c10 torch torch_cpu torch_python)
  # Not cached: the next configuration may run under another torch.
  find_library(torch_library ${name} PATHS ${torch_library_dirs} NO_DEFAULT_PATH NO_CACHE REQUIRED)
  list(APPEND FUSEDOPT_TORCH_LIBRARIES ${torch_library})
  unset(torch_library)
endforeach()

# fusedopt_python_objects(target sources...): C++ that sees torch and Python.
function(fusedopt_python_objects target)
  add_library(${target} OBJECT ${ARGN})
  target_include_directories(${target} SYSTEM PRIVATE ${torch_include_dirs})
  target_compile_definitions(${target} PRIVATE _GLIBCXX_USE_CXX11_ABI=${torch_cxx11_abi}
                                               TORCH_EXTENSION_NAME=_C)
  target_link_libraries(${target} PRIVATE fusedopt_common Python::Module)
  # torch's headers cost more than all of csrc/python: five files at once compile in 25 s, one by one in 80.
  set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
endfunction()

file(GLOB python_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/python/*.cpp)
if(NOT FUSEDOPT_CUDA)
  list(FILTER python_sources EXCLUDE REGEX "/cuda_plan\\.cpp$")
endif()
fusedopt_python_objects(fusedopt_python ${python_sources})
if(FUSEDOPT_CUDA)
  target_compile_definitions(fusedopt_python PRIVATE FUSEDOPT_WITH_CUDA)
endif()
