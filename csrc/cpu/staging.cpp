// Staging for one instruction set (FUSEDOPT_ISA): converts number types and gathers or scatters
// strides between an operand's memory and a small buffer of the compute type.
#ifdef __F16C__
#include <immintrin.h>
#endif

#include <type_traits>

#include "cpu/operand.h"

namespace fusedopt::cpu {
namespace FUSEDOPT_ISA {
namespace {

// Calls visit(element, offset) for `count` consecutive elements from `first`, in row-major order of
// the layout's sizes.
template <typename Visit>
inline void for_each_offset(const int64_t* layout, int operand, int64_t first, int count,
                            Visit visit) {
  constexpr int kMaxDims = 64;
  const int64_t ndim = Layout::ndim(layout);
  const int64_t* sizes = Layout::sizes(layout);
  const int64_t* strides = Layout::strides(layout, operand);
  int64_t index[kMaxDims];
  int64_t offset = 0;
  for (int64_t d = ndim - 1, rest = first; d >= 0; --d) {
    index[d] = rest % sizes[d];
    rest /= sizes[d];
    offset += index[d] * strides[d];
  }
  for (int i = 0; i < count; ++i) {
    visit(i, offset);
    for (int64_t d = ndim - 1; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < sizes[d]) break;
      offset -= index[d] * strides[d];
      index[d] = 0;
    }
  }
}

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

// Calls use(memory) with the operand's base as a pointer to its own number type.
template <typename T, typename Use>
void with_storage(const Operand<T>& operand, Use use) {
  switch (operand.type) {
    case DType::kFloat32:
      return use(static_cast<float*>(operand.base));
    case DType::kFloat64:
      return use(static_cast<double*>(operand.base));
    case DType::kFloat16:
      return use(static_cast<Float16*>(operand.base));
    case DType::kBFloat16:
      return use(static_cast<BFloat16*>(operand.base));
  }
}

}  // namespace

template <typename T>
void stage_in(const Operand<T>& operand, int64_t first, int count, T* buffer) {
  with_storage(operand, [&](auto* memory) {
    if (operand.layout == nullptr) {
      widen_run(memory + first, count, buffer);
    } else {
      for_each_offset(operand.layout, operand.index, first, count,
                      [&](int i, int64_t offset) { buffer[i] = load_as<T>(memory[offset]); });
    }
  });
}

template <typename T>
void stage_out(const Operand<T>& operand, int64_t first, int count, const T* buffer) {
  with_storage(operand, [&](auto* memory) {
    if (operand.layout == nullptr) {
      narrow_run(buffer, count, memory + first);
    } else {
      for_each_offset(operand.layout, operand.index, first, count,
                      [&](int i, int64_t offset) { store_as(memory[offset], buffer[i]); });
    }
  });
}

template void stage_in(const Operand<float>&, int64_t, int, float*);
template void stage_in(const Operand<double>&, int64_t, int, double*);
template void stage_out(const Operand<float>&, int64_t, int, const float*);
template void stage_out(const Operand<double>&, int64_t, int, const double*);

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt::cpu
