# The CUDA backend: apply.cu once for every rule, the other .cu files once. It sees neither torch nor
# a driver, and carries the CUDA runtime in itself. Result: FUSEDOPT_CUDA_OBJECTS.

# setup.py chooses them. By hand PTX has to do, which a driver compiles when it loads it.
set(FUSEDOPT_CUDA_PASSES "arch=compute_80,code=compute_80"
    CACHE STRING "What nvcc compiles for: arguments of --gencode, a pass of its front end each")
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# Correctly rounded, uncontracted arithmetic: the same bits as on the CPU.
list(TRANSFORM FUSEDOPT_CUDA_PASSES PREPEND "SHELL:-gencode " OUTPUT_VARIABLE cuda_flags)
list(APPEND cuda_flags
     -O3 -fmad=false -prec-div=true -prec-sqrt=true -ftz=false
     -Xcompiler=-fvisibility=hidden,-ffp-contract=off,-Wall,-Wextra)

# One object for every rule leaves cores idle on a large machine: there each nvcc takes several
# architectures at a time.
cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
list(LENGTH FUSEDOPT_RULES rule_count)
math(EXPR nvcc_threads "${cores} / (${rule_count} + 1)")
if(nvcc_threads GREATER 1)
  list(APPEND cuda_flags --threads=${nvcc_threads})
endif()

set(FUSEDOPT_CUDA_OBJECTS "")

macro(fusedopt_cuda_objects target)
  add_library(${target} OBJECT ${ARGN})
  target_link_libraries(${target} PRIVATE fusedopt_common)
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_flags}>")
  list(APPEND FUSEDOPT_CUDA_OBJECTS $<TARGET_OBJECTS:${target}>)
endmacro()

file(GLOB cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cu
     ${PROJECT_SOURCE_DIR}/csrc/cuda/*.cpp)
list(REMOVE_ITEM cuda_sources ${PROJECT_SOURCE_DIR}/csrc/cuda/apply.cu)
fusedopt_cuda_objects(fusedopt_cuda ${cuda_sources})
target_link_libraries(fusedopt_cuda PRIVATE CUDA::toolkit)

foreach(rule IN LISTS FUSEDOPT_RULES)
  set(target fusedopt_cuda_apply_${rule})
  fusedopt_cuda_objects(${target} csrc/cuda/apply.cu)
  target_compile_definitions(${target} PRIVATE FUSEDOPT_RULE=${rule}
                                               FUSEDOPT_RULE_HEADER="rules/${rule}.h")
endforeach()
