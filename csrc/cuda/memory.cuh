// How kernels read and write memory: 16 bytes or one element at a time, converted to and from the
// compute type. GPUs convert half types in one instruction; it rounds as core/numbers.h does, so
// only the payload of a NaN can differ.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "core/numbers.h"

#define FUSEDOPT_DEVICE __device__ __forceinline__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define FUSEDOPT_NATIVE_HALVES
#endif

namespace fusedopt::cuda {

constexpr int kAccessBytes = 16;

// Makes the compiler read shared memory again instead of holding its contents in registers. It then
// also cannot compile code anew for every combination of the conditions found there, which doubles
// or quadruples the kernels of some rules.
FUSEDOPT_DEVICE void reread_shared_memory() { asm volatile("" ::: "memory"); }

// A pointer that came out of a table, which the compiler cannot know to be one to device memory:
// without the hint it uses the slower generic accesses.
template <typename Pointed>
FUSEDOPT_DEVICE Pointed* in_global_memory(Pointed* p) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// Keeps a pointer to shared memory in a register: left to itself, the compiler works out where
// shared memory begins anew for every access.
template <typename Pointed>
FUSEDOPT_DEVICE Pointed* hold_shared_address(Pointed* p) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(p));
  __builtin_assume(__isShared(p));
#endif
  return p;
}

// Brings what stands there to the second-level cache, without waiting for it and without a
// register.
FUSEDOPT_DEVICE void prefetch_line([[maybe_unused]] const void* at) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" : : "l"(__cvta_generic_to_global(at)));
#endif
}

#ifdef FUSEDOPT_NATIVE_HALVES
FUSEDOPT_DEVICE float widen_native(Float16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}

FUSEDOPT_DEVICE uint32_t narrow_pair(float low, float high, Float16) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

FUSEDOPT_DEVICE uint32_t narrow_pair(float low, float high, BFloat16) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// a * b + c of two halves each.
FUSEDOPT_DEVICE uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c, Float16) {
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

FUSEDOPT_DEVICE uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c, BFloat16) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
#endif

template <typename T, typename Storage>
FUSEDOPT_DEVICE T from_storage(Storage x) {
#ifdef FUSEDOPT_NATIVE_HALVES
  if constexpr (std::is_same_v<Storage, Float16>) return static_cast<T>(widen_native(x));
#endif
  return load_as<T>(x);
}

template <typename Storage, typename T>
FUSEDOPT_DEVICE Storage to_storage(T x) {
#ifdef FUSEDOPT_NATIVE_HALVES
  if constexpr (sizeof(Storage) == 2) {
    return Storage{static_cast<uint16_t>(narrow_pair(static_cast<float>(x), 0.0f, Storage{}))};
  }
#endif
  Storage result;
  store_as(result, x);
  return result;
}

template <typename T, typename Storage>
FUSEDOPT_DEVICE T load_single(const Storage* from) {
  return from_storage<T>(*in_global_memory(from));
}

template <typename Storage, typename T>
FUSEDOPT_DEVICE void store_single(Storage* to, T from) {
  *in_global_memory(to) = to_storage<Storage>(from);
}

// That many bytes, read and written in one access.
template <int kBytes>
using Raw = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint1, ushort1>>>;

template <int kBytes = kAccessBytes>
FUSEDOPT_DEVICE Raw<kBytes> load_raw(const void* from) {
  static_assert(sizeof(Raw<kBytes>) == kBytes);
  return *in_global_memory(static_cast<const Raw<kBytes>*>(from));
}

// The elements of 16 bytes.
template <typename Storage, typename T>
FUSEDOPT_DEVICE void unpack(const uint4& raw, T* to) {
  constexpr int kEach = kAccessBytes / sizeof(Storage);
  Storage values[kEach];
  memcpy(values, &raw, sizeof(raw));
#pragma unroll
  for (int i = 0; i < kEach; ++i) to[i] = from_storage<T>(values[i]);
}

// kCount elements from an address that is a multiple of 16 bytes.
template <typename Storage, int kCount, typename T>
FUSEDOPT_DEVICE void load_vector(const Storage* from, T (&to)[kCount]) {
  constexpr int kEach = kAccessBytes / sizeof(Storage);
  static_assert(kCount % kEach == 0);
#pragma unroll
  for (int at = 0; at < kCount; at += kEach) unpack<Storage>(load_raw(from + at), to + at);
}

// The same to memory, in accesses of fewer bytes where kCount elements have no more.
template <typename Storage, int kCount, typename T>
FUSEDOPT_DEVICE void store_vector(Storage* to, const T (&from)[kCount]) {
  constexpr int kMost = kAccessBytes / sizeof(Storage);
  constexpr int kEach = kCount < kMost ? kCount : kMost;
  static_assert(kCount % kEach == 0);
#pragma unroll
  for (int access = 0; access < kCount / kEach; ++access) {
    const T* const x = from + access * kEach;
    Storage values[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) values[i] = to_storage<Storage>(x[i]);
#ifdef FUSEDOPT_NATIVE_HALVES
    if constexpr (sizeof(Storage) == 2) {
      uint32_t pairs[kEach / 2];
#pragma unroll
      for (int i = 0; i < kEach / 2; ++i) {
        pairs[i] = narrow_pair(x[2 * i], x[2 * i + 1], Storage{});
      }
      memcpy(values, pairs, sizeof(values));
    }
#endif
    Raw<kEach * sizeof(Storage)> raw;
    memcpy(&raw, values, sizeof(raw));
    in_global_memory(reinterpret_cast<decltype(raw)*>(to))[access] = raw;
  }
}

// The value of a 0-dim tensor.
FUSEDOPT_DEVICE double read_number(const void* from, DType type) {
  switch (type) {
    case DType::kFloat32:
      return *static_cast<const float*>(from);
    case DType::kFloat64:
      return *static_cast<const double*>(from);
    case DType::kFloat16:
      return from_storage<float>(*static_cast<const Float16*>(from));
    case DType::kBFloat16:
      return from_storage<float>(*static_cast<const BFloat16*>(from));
  }
  return 0.0;
}

// How many elements stand before the first address that is a multiple of 16 bytes.
template <typename Storage>
FUSEDOPT_DEVICE int elements_to_alignment(const Storage* p) {
  constexpr int kEach = kAccessBytes / sizeof(Storage);
  return static_cast<int>(-(reinterpret_cast<uintptr_t>(p) / sizeof(Storage)) & (kEach - 1));
}

template <typename Storage>
FUSEDOPT_DEVICE bool is_aligned(const Storage* p) {
  return reinterpret_cast<uintptr_t>(p) % kAccessBytes == 0;
}

// Where element `index` stands in each of the first kCount operands of a row, in elements from its
// base.
template <int kCount>
FUSEDOPT_DEVICE void strided_offsets(const int64_t* layout, int64_t index,
                                     int64_t (&offsets)[kCount]) {
  const int64_t* sizes = Layout::sizes(layout);
#pragma unroll
  for (int k = 0; k < kCount; ++k) offsets[k] = 0;
#pragma unroll 1
  for (int64_t d = Layout::ndim(layout) - 1; d >= 0; --d) {
    const int64_t rest = index / sizes[d];
    const int64_t coordinate = index - rest * sizes[d];
#pragma unroll
    for (int k = 0; k < kCount; ++k) offsets[k] += coordinate * Layout::strides(layout, k)[d];
    index = rest;
  }
}

}  // namespace fusedopt::cuda
