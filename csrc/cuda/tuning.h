// Numbers that a sweep on a GPU (benchmarks/sweep.py) gives in the environment, instead of ours.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace fusedopt::cuda {

// `ours`, unless the environment has `name`.
inline int64_t tuned(const char* name, int64_t ours) {
  const char* const text = std::getenv(name);
  return text == nullptr ? ours : std::atoll(text);
}

// Shared memory that no kernel uses: the more of it a block asks for, the fewer share a
// multiprocessor.
inline int unused_shared_bytes() {
  static const int bytes = static_cast<int>(tuned("FUSEDOPT_UNUSED_SHARED_BYTES", 0));
  return bytes;
}

}  // namespace fusedopt::cuda
