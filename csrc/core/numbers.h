// The number types of parameters, gradients and states, and their conversions to the type a rule
// computes in. Everything rounds to nearest even with integers only, so that every compiler and
// instruction set gives the same bits, vectorised or not.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FUSEDOPT_NUMBERS_HD __host__ __device__ __forceinline__
#else
#define FUSEDOPT_NUMBERS_HD inline __attribute__((always_inline))
#endif

namespace fusedopt {

enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type that holds values of DType in memory.
template <DType kType>
struct StorageOf;
template <>
struct StorageOf<DType::kFloat32> {
  using type = float;
};
template <>
struct StorageOf<DType::kFloat64> {
  using type = double;
};
template <>
struct StorageOf<DType::kFloat16> {
  using type = Float16;
};
template <>
struct StorageOf<DType::kBFloat16> {
  using type = BFloat16;
};

FUSEDOPT_NUMBERS_HD constexpr int size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

template <typename To, typename From>
FUSEDOPT_NUMBERS_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FUSEDOPT_NUMBERS_HD float widen(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }

// Normal halves are rebiased by an integer add, infinity and NaN by two; subnormal ones are their
// mantissa times 2^-24, which is exact. No float is subnormal on the way: those cost a CPU a
// hundred cycles each.
FUSEDOPT_NUMBERS_HD float widen(Float16 x) {
  constexpr uint32_t kRebias = 112u << 23;
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t mantissa = x.bits & 0x03ffu;
  const uint32_t rest = uint32_t{x.bits & 0x7fffu} << 13;
  const uint32_t subnormal =
      bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(mantissa)) * 0x1p-24f);
  uint32_t result = rest + kRebias;
  result = rest >= 0x0f800000u ? result + kRebias : result;
  result = rest < 0x00800000u ? subnormal : result;
  return bit_cast<float>(sign | result);
}

FUSEDOPT_NUMBERS_HD BFloat16 narrow_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = x != x;
  return BFloat16{static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded)};
}

// Normal results round by an integer add; subnormal ones by adding the float whose last place is
// half's smallest subnormal.
FUSEDOPT_NUMBERS_HD Float16 narrow_float16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u
               ? 0x7c00u
               : result;  // 65536 and above; the add above carries 65520 there too
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return Float16{static_cast<uint16_t>(sign | result)};
}

// Memory to compute type and back; T is float or double.
template <typename T>
FUSEDOPT_NUMBERS_HD T load_as(float x) {
  return static_cast<T>(x);
}
template <typename T>
FUSEDOPT_NUMBERS_HD T load_as(double x) {
  return static_cast<T>(x);
}
template <typename T>
FUSEDOPT_NUMBERS_HD T load_as(Float16 x) {
  return static_cast<T>(widen(x));
}
template <typename T>
FUSEDOPT_NUMBERS_HD T load_as(BFloat16 x) {
  return static_cast<T>(widen(x));
}

template <typename T>
FUSEDOPT_NUMBERS_HD void store_as(float& to, T x) {
  to = static_cast<float>(x);
}
template <typename T>
FUSEDOPT_NUMBERS_HD void store_as(double& to, T x) {
  to = static_cast<double>(x);
}
template <typename T>
FUSEDOPT_NUMBERS_HD void store_as(Float16& to, T x) {
  to = narrow_float16(static_cast<float>(x));
}
template <typename T>
FUSEDOPT_NUMBERS_HD void store_as(BFloat16& to, T x) {
  to = narrow_bfloat16(static_cast<float>(x));
}

}  // namespace fusedopt
