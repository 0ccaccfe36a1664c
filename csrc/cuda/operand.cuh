// How the passes reach an operand of a row: one small interface, whether its type was known when
// the kernel was compiled or only the row says it.
#pragma once

#include "cuda/memory.cuh"

namespace fusedopt::cuda {

// Stands for whatever type the row says, in kernels that compute in T.
template <typename T>
struct Mixed {
  T value;
};

template <typename Storage>
constexpr bool kIsMixed = false;
template <typename T>
constexpr bool kIsMixed<Mixed<T>> = true;

// What kernels compute in whose parameters, or gradients, are stored like this.
template <typename Storage>
using ComputeOf = std::conditional_t<sizeof(Storage) == sizeof(double), double, float>;

// Offsets count in elements. What is fetched is a number only once it has settled: between the two
// a kernel asks for other operands instead of waiting for this one. Vectors are for where
// `vector_head` and `takes_vector` say so; `settle` must be told which it was.
template <typename Storage>
class OperandAccess {
 public:
  OperandAccess() = default;
  FUSEDOPT_DEVICE explicit OperandAccess(const Operand& operand)
      : memory_(static_cast<Storage*>(operand.data)) {}

  FUSEDOPT_DEVICE const Storage* data() const { return memory_; }
  FUSEDOPT_DEVICE void advance(int64_t count) { memory_ += count; }
  FUSEDOPT_DEVICE void prefetch(int64_t at) const { prefetch_line(memory_ + at); }

  // How many elements stand before the first vector.
  FUSEDOPT_DEVICE int vector_head() const { return elements_to_alignment(memory_); }
  FUSEDOPT_DEVICE bool takes_vector(int at) const { return is_aligned(memory_ + at); }

  template <typename T, int kCount>
  FUSEDOPT_DEVICE void fetch_vector(int at, T (&to)[kCount]) const {
    load_vector(memory_ + at, to);
  }
  template <typename T>
  FUSEDOPT_DEVICE void fetch(int64_t at, T& to) const {
    to = load_single<T>(memory_ + at);
  }
  template <typename T, int kCount>
  FUSEDOPT_DEVICE void settle(T (&)[kCount], bool /*vector*/) const {}

  template <typename T, int kCount>
  FUSEDOPT_DEVICE void store_vector(int at, const T (&from)[kCount]) const {
    cuda::store_vector(memory_ + at, from);
  }
  template <typename T>
  FUSEDOPT_DEVICE void store(int64_t at, T from) const {
    store_single(memory_ + at, from);
  }

 private:
  Storage* memory_;
};

// A vector is 16 bytes of T, and what is stored of it 16 bytes at most. A warp has one row, so that
// no branch on its types divides it.
template <typename T>
class OperandAccess<Mixed<T>> {
 public:
  OperandAccess() = default;
  FUSEDOPT_DEVICE explicit OperandAccess(const Operand& operand)
      : memory_(static_cast<std::byte*>(operand.data)), type_(operand.type) {}

  FUSEDOPT_DEVICE void advance(int64_t count) { memory_ += count * size_of(type_); }
  FUSEDOPT_DEVICE void prefetch(int64_t at) const { prefetch_line(memory_ + at * size_of(type_)); }

  FUSEDOPT_DEVICE int vector_head() const {
    const int bytes = static_cast<int>(-reinterpret_cast<uintptr_t>(memory_) & (alignment() - 1));
    return bytes >> (type_ == DType::kFloat64 ? 3 : type_ == DType::kFloat32 ? 2 : 1);
  }
  FUSEDOPT_DEVICE bool takes_vector(int at) const {
    return (reinterpret_cast<uintptr_t>(memory_ + at * size_of(type_)) & (alignment() - 1)) == 0;
  }

  template <int kCount>
  FUSEDOPT_DEVICE void fetch_vector(int at, T (&to)[kCount]) const {
    with_width([&](auto storage) {
      const auto* const from = pointer<decltype(storage)>() + at;
      if constexpr (sizeof(storage) > sizeof(T)) {
        load_vector(from, to);
      } else {
        const auto raw = load_raw<kCount * sizeof(storage)>(from);
        memcpy(to, &raw, sizeof(raw));
      }
    });
  }
  FUSEDOPT_DEVICE void fetch(int64_t at, T& to) const {
    with_width([&](auto storage) {
      const auto* const from = pointer<decltype(storage)>() + at;
      if constexpr (sizeof(storage) > sizeof(T)) {
        to = load_single<T>(from);
      } else {
        const auto raw = load_raw<sizeof(storage)>(from);
        Word word = 0;
        memcpy(&word, &raw, sizeof(raw));
        to = bit_cast<T>(word);
      }
    });
  }
  // Numbers of a vector stand one behind the other at first, others each in the place that it gets.
  template <int kCount>
  FUSEDOPT_DEVICE void settle(T (&values)[kCount], bool vector) const {
    with_storage([&](auto storage) {
      if constexpr (sizeof(storage) < sizeof(T)) {
        decltype(storage) stored[kCount];
        if (vector) {
          memcpy(stored, values, sizeof(stored));
        } else {
#pragma unroll
          for (int i = 0; i < kCount; ++i) memcpy(&stored[i], &values[i], sizeof(storage));
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] = from_storage<T>(stored[i]);
      }
    });
  }

  template <int kCount>
  FUSEDOPT_DEVICE void store_vector(int at, const T (&from)[kCount]) const {
    with_storage(
        [&](auto storage) { cuda::store_vector(pointer<decltype(storage)>() + at, from); });
  }
  FUSEDOPT_DEVICE void store(int64_t at, T from) const {
    with_storage([&](auto storage) { store_single(pointer<decltype(storage)>() + at, from); });
  }

 private:
  using Word = std::conditional_t<sizeof(T) == sizeof(double), uint64_t, uint32_t>;

  template <typename Storage>
  FUSEDOPT_DEVICE Storage* pointer() const {
    return reinterpret_cast<Storage*>(memory_);
  }
  FUSEDOPT_DEVICE uintptr_t alignment() const {
    return min(kAccessBytes, kAccessBytes / int(sizeof(T)) * size_of(type_));
  }

  // Calls use(a number of this type).
  template <typename Use>
  FUSEDOPT_DEVICE void with_storage(Use use) const {
    switch (type_) {
      case DType::kFloat32:
        return use(float{});
      case DType::kFloat64:
        return use(double{});
      case DType::kFloat16:
        return use(Float16{});
      case DType::kBFloat16:
        return use(BFloat16{});
    }
  }
  // The same where types of one size are alike.
  template <typename Use>
  FUSEDOPT_DEVICE void with_width(Use use) const {
    switch (size_of(type_)) {
      case sizeof(float):
        return use(float{});
      case sizeof(double):
        return use(double{});
      default:
        return use(Float16{});
    }
  }

  std::byte* memory_;
  DType type_;
};

}  // namespace fusedopt::cuda
