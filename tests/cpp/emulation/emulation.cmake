# The CUDA backend compiled for the CPU by the C++ compiler: the sources of csrc/cuda with the header cuda_runtime.h of this
# folder in the place of CUDA's. Include after the C++ tests are declared; cuda_*_test gets it. With Python, also the target
# fusedopt_emulated: the extension, whose "GPU" is the CPU, for tests only.
set(emulation_dir ${CMAKE_CURRENT_LIST_DIR})
set(FUSEDOPT_CUDA_EMULATED_OBJECTS "")

macro(fusedopt_emulated_objects target)
  add_library(${target} OBJECT EXCLUDE_FROM_ALL ${ARGN})
  target_include_directories(${target} BEFORE PRIVATE ${emulation_dir})
  target_link_libraries(${target} PRIVATE fusedopt_common)
  # Not -O3: there are 100 kernels, and the tests wait for the compiler. A GPU faults on a misaligned 16-byte access; so does
  # the emulation.
  target_compile_options(
    ${target} PRIVATE -O1 -Wno-unknown-pragmas -fsanitize=alignment
                      -fsanitize-undefined-trap-on-error)
  list(APPEND FUSEDOPT_CUDA_EMULATED_OBJECTS $<TARGET_OBJECTS:${target}>)
endmacro()

file(GLOB emulated_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cpp)
fusedopt_emulated_objects(
  fusedopt_cuda_emulated ${emulated_sources} ${emulation_dir}/blocks.cpp ${emulation_dir}/memory.cpp
  ${emulation_dir}/pointers.cpp ${emulation_dir}/runtime.cpp ${emulation_dir}/reduce.cpp)
foreach(rule IN LISTS FUSEDOPT_RULES)
  fusedopt_emulated_objects(fusedopt_cuda_emulated_${rule} ${emulation_dir}/apply.cpp)
  target_compile_definitions(
    fusedopt_cuda_emulated_${rule} PRIVATE FUSEDOPT_RULE=${rule}
                                           FUSEDOPT_RULE_HEADER="rules/${rule}.h")
endforeach()

foreach(test IN ITEMS cuda_emulation_test cuda_plan_test cuda_strict_test)
  target_sources(${test} PRIVATE ${FUSEDOPT_CUDA_EMULATED_OBJECTS})
  target_include_directories(${test} BEFORE PRIVATE ${emulation_dir})
endforeach()

if(FUSEDOPT_PYTHON)
  # csrc/python as it is, compiled once more where the extension itself has no CUDA.
  if(FUSEDOPT_CUDA)
    set(emulated_python fusedopt_python)
  else()
    set(emulated_python fusedopt_python_emulated)
    file(GLOB all_python_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/python/*.cpp)
    fusedopt_python_objects(${emulated_python} ${all_python_sources})
    target_compile_definitions(${emulated_python} PRIVATE FUSEDOPT_WITH_CUDA)
    set_target_properties(${emulated_python} PROPERTIES EXCLUDE_FROM_ALL ON)
  endif()
  fusedopt_python_objects(fusedopt_torch_emulated ${emulation_dir}/torch_device.cpp
                          ${emulation_dir}/module.cpp)
  target_include_directories(fusedopt_torch_emulated BEFORE PRIVATE ${emulation_dir})
  set_target_properties(fusedopt_torch_emulated PROPERTIES EXCLUDE_FROM_ALL ON)
  Python_add_library(
    fusedopt_emulated MODULE EXCLUDE_FROM_ALL $<TARGET_OBJECTS:${emulated_python}>
    $<TARGET_OBJECTS:fusedopt_torch_emulated> ${FUSEDOPT_CUDA_EMULATED_OBJECTS}
    ${FUSEDOPT_CPU_OBJECTS})
  set_target_properties(fusedopt_emulated PROPERTIES LINKER_LANGUAGE CXX PREFIX "")
  target_link_libraries(fusedopt_emulated PRIVATE OpenMP::OpenMP_CXX ${FUSEDOPT_TORCH_LIBRARIES})
  add_dependencies(fusedopt_tests fusedopt_emulated)
endif()
