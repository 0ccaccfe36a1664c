# The CPU backend: apply.cpp once for every rule and instruction set, reduce.cpp and staging.cpp once
# for every instruction set, the rest once. Nothing here sees torch. Result: FUSEDOPT_CPU_OBJECTS.
find_package(OpenMP REQUIRED COMPONENTS CXX)

# Worst first; each with the expression that says whether the CPU has it.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(isas v2 v3 v4)
  foreach(isa IN LISTS isas)
    set(isa_supported_${isa} "__builtin_cpu_supports(\"x86-64-${isa}\")")
    set(isa_flags_${isa} -march=x86-64-${isa})
  endforeach()
  list(APPEND isa_flags_v4 -mprefer-vector-width=256)
else()
  set(isas generic)
  set(isa_supported_generic true)
endif()

# The list in the generated header is best first.
set(lines "")
foreach(isa IN LISTS isas)
  string(PREPEND lines "FUSEDOPT_ISA_ENTRY(${isa}, ${isa_supported_${isa}})\n")
endforeach()
file(CONFIGURE OUTPUT ${FUSEDOPT_GENERATED_DIR}/isa_list.inc CONTENT "${lines}")

# An inline function that several objects contain out of line is kept from the FIRST of them. The order
# here, from the plainest code to the newest instruction set, makes sure that code which runs
# everywhere never ends up with instructions that the machine lacks.
set(FUSEDOPT_CPU_OBJECTS "")

macro(fusedopt_cpu_objects target)
  add_library(${target} OBJECT ${ARGN})
  target_link_libraries(${target} PRIVATE fusedopt_common OpenMP::OpenMP_CXX)
  list(APPEND FUSEDOPT_CPU_OBJECTS $<TARGET_OBJECTS:${target}>)
endmacro()

file(GLOB cpu_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/core/*.cpp
     ${PROJECT_SOURCE_DIR}/csrc/cpu/*.cpp)
list(FILTER cpu_sources EXCLUDE REGEX "/(apply|reduce|staging)\\.cpp$")
fusedopt_cpu_objects(fusedopt_cpu ${cpu_sources})

foreach(isa IN LISTS isas)
  fusedopt_cpu_objects(fusedopt_cpu_${isa} csrc/cpu/reduce.cpp csrc/cpu/staging.cpp)
  target_compile_options(fusedopt_cpu_${isa} PRIVATE ${isa_flags_${isa}})
  target_compile_definitions(fusedopt_cpu_${isa} PRIVATE FUSEDOPT_ISA=${isa})
  foreach(rule IN LISTS FUSEDOPT_RULES)
    set(target fusedopt_cpu_apply_${rule}_${isa})
    fusedopt_cpu_objects(${target} csrc/cpu/apply.cpp)
    target_compile_options(${target} PRIVATE ${isa_flags_${isa}})
    target_compile_definitions(
      ${target} PRIVATE FUSEDOPT_ISA=${isa} FUSEDOPT_RULE=${rule}
                        FUSEDOPT_RULE_HEADER="rules/${rule}.h")
  endforeach()
endforeach()
