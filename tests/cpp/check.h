// The one assertion of the C++ tests: counts failures, prints the first of them and goes on.
#pragma once

#include <cstdio>

namespace fusedopt {

inline int failures = 0;

// CHECK(condition, format, arguments...): the rest is printed as by printf when the condition
// fails.
#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition) && ++fusedopt::failures < 40) {              \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (false)

// The exit status of a test.
inline int report() {
  std::printf("%d failed checks\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace fusedopt
