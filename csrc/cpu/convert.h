// Runs of elements from memory to the compute type and back, for one instruction set
// (FUSEDOPT_ISA).
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include <type_traits>

#include "core/numbers.h"

namespace fusedopt::cpu {
namespace FUSEDOPT_ISA {

// `count` consecutive elements to the compute type and back. Floats to halves and back take the
// CPU's own instruction where it has one, which rounds as numbers.h does.
template <typename T, typename Storage>
void widen_run(const Storage* memory, int count, T* buffer) {
  int i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<Storage, Float16> && std::is_same_v<T, float>) {
    for (; i + 8 <= count; i += 8) {
      const auto halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(memory + i));
      _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(halves));
    }
  }
#endif
  for (; i < count; ++i) buffer[i] = load_as<T>(memory[i]);
}

template <typename T, typename Storage>
void narrow_run(const T* buffer, int count, Storage* memory) {
  int i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<Storage, Float16> && std::is_same_v<T, float>) {
    for (; i + 8 <= count; i += 8) {
      const auto halves = _mm256_cvtps_ph(_mm256_loadu_ps(buffer + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(memory + i), halves);
    }
  }
#endif
  for (; i < count; ++i) store_as(memory[i], buffer[i]);
}

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt::cpu
