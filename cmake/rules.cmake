# The list of rules (one header each) and the compile flags that every part shares.

file(GLOB rule_headers CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/rules/*.h)
set(FUSEDOPT_RULES "")
foreach(header IN LISTS rule_headers)
  get_filename_component(rule ${header} NAME_WE)
  if(NOT rule STREQUAL "common")
    list(APPEND FUSEDOPT_RULES ${rule})
  endif()
endforeach()
list(SORT FUSEDOPT_RULES)

set(FUSEDOPT_GENERATED_DIR ${PROJECT_BINARY_DIR}/generated)
set(names "")
set(includes "")
foreach(rule IN LISTS FUSEDOPT_RULES)
  string(APPEND names "FUSEDOPT_RULE(${rule})\n")
  string(APPEND includes "#include \"rules/${rule}.h\"\n")
endforeach()
file(CONFIGURE OUTPUT ${FUSEDOPT_GENERATED_DIR}/rules_list.inc CONTENT "${names}")
file(CONFIGURE OUTPUT ${FUSEDOPT_GENERATED_DIR}/rules_headers.inc CONTENT "${includes}")

# -fno-math-errno lets sqrt be vectorised, -fno-trapping-math selects; neither changes a result. Unswitching would compile
# eight copies of every loop. Contraction would make results depend on the instruction set.
set(FUSEDOPT_CXX_FLAGS ${FUSEDOPT_OPTIMIZATION} -fno-math-errno -fno-trapping-math -fno-unswitch-loops
    -ffp-contract=off -fvisibility=hidden -Wall -Wextra)

add_library(fusedopt_common INTERFACE)
target_include_directories(fusedopt_common INTERFACE ${PROJECT_SOURCE_DIR}/csrc
                                                     ${FUSEDOPT_GENERATED_DIR})
target_compile_options(fusedopt_common
                       INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${FUSEDOPT_CXX_FLAGS}>")
