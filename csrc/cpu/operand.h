// An operand of a row (core/table.h), seen by the loops as an array of the compute type: in place
// where the memory is already that, else through a small buffer that converts types and gathers
// strides.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/table.h"

namespace fusedopt::cpu {

// Elements staged at once: the buffers of all operands stay in the first-level cache.
constexpr int kBlock = 512;

namespace FUSEDOPT_ISA {

template <typename T>
struct Array;

// What cannot be used in place, to and from a buffer (staging.cpp).
template <typename T>
void stage_in(const Array<T>& array, int64_t first, int count, T* buffer);
template <typename T>
void stage_out(const Array<T>& array, int64_t first, int count, const T* buffer);

template <typename T>
struct Array {
  bool in_place() const { return layout == nullptr && operand.type == kOwnType; }

  // The values of `count` elements from `first`: in place, or read into `buffer`.
  T* read(int64_t first, int count, T* buffer) const {
    if (in_place()) return static_cast<T*>(operand.data) + first;
    stage_in(*this, first, count, buffer);
    return buffer;
  }

  // Writes back what `read` staged; nothing to do in place.
  void write(int64_t first, int count, const T* buffer) const {
    if (!in_place()) stage_out(*this, first, count, buffer);
  }

  static constexpr DType kOwnType = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;

  Operand operand;
  const int64_t* layout;
  int index;  // among the operands of a row
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt::cpu
