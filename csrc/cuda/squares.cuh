// How the reduce pass adds up the squares of a piece, in the order of core/sum_order.h.
#pragma once

#include "core/control.h"
#include "core/sum_order.h"
#include "cuda/block.cuh"
#include "cuda/operand.cuh"

namespace fusedopt::cuda {

// Whether inf or nan was among what it has seen: 0 x inf and 0 x nan are nan, and 0 times anything
// else is 0.
template <typename Storage>
class Judge {
 public:
  template <typename T>
  FUSEDOPT_DEVICE void see(T x) {
    poison_ = fma(static_cast<Compute>(x), Compute(0), poison_);
  }
  FUSEDOPT_DEVICE void see(const uint4& raw) {
#ifdef FUSEDOPT_NATIVE_HALVES
    if constexpr (sizeof(Storage) == 2) {
      for (const uint32_t pair : {raw.x, raw.y, raw.z, raw.w}) {
        pairs_ = multiply_add_pair(pair, 0u, pairs_, Storage{});
      }
      return;
    }
#endif
    Compute values[kAccessBytes / sizeof(Storage)];
    unpack<Storage>(raw, values);
#pragma unroll
    for (const Compute x : values) see(x);
  }
  FUSEDOPT_DEVICE bool nonfinite() const { return poison_ != Compute(0) || pairs_ != 0u; }

 private:
  using Compute = ComputeOf<Storage>;
  Compute poison_ = 0;
  uint32_t pairs_ = 0;
};

// The square of a float is exact in double, so that a fused multiply-add rounds as two operations
// do; of a double it is not.
FUSEDOPT_DEVICE double add_square(float x, double sum) {
  return fma(static_cast<double>(x), static_cast<double>(x), sum);
}
FUSEDOPT_DEVICE double add_square(double x, double sum) { return sum + x * x; }

// Elements of the two strips that a warp adds up with a lane a thread.
constexpr int kGranule = 2 * kStrip;

// Adds up one piece of one gradient. Warps take turns at its elements, each with enough for a sum
// of the tree, and leave those sums in `sums`, one for each granule.
template <typename Storage>
class Squares {
 public:
  // `max_value` is not read without kClamp.
  FUSEDOPT_DEVICE Squares(double unscale, double max_value, double* sums)
      : unscale_(T(unscale)), max_value_(T(max_value)), sums_(sums) {}

  // Whether this thread has seen inf or nan.
  FUSEDOPT_DEVICE bool nonfinite() const { return judge_.nonfinite(); }

  template <bool kClamp>
  FUSEDOPT_DEVICE void add(OperandAccess<Storage> grad, const int64_t* layout, const Piece& piece) {
    if (layout != nullptr) {
      add_singles<kClamp, 1>(grad, 0, piece.length, [&](int i) {
        int64_t offsets[2];
        strided_offsets(layout, piece.begin + i, offsets);
        return offsets[1];
      });
      return;
    }
    grad.advance(piece.begin);
    int done = 0;
    if constexpr (!kIsMixed<Storage>) {
      if (grad.takes_vector(0)) done = add_units<kClamp>(grad.data(), piece.length);
    }
    add_singles<kClamp, kStripRows>(grad, done, piece.length, [](int i) { return i; });
  }

 private:
  using T = ComputeOf<Storage>;
  static constexpr int kVector = kAccessBytes / sizeof(Storage);
  static constexpr int kThreadsOfStrip = kLanes / kVector;
  static constexpr int kUnit = kWarp * kVector * kStripRows;

  FUSEDOPT_DEVICE static int thread() { return threadIdx.x % kWarp; }
  FUSEDOPT_DEVICE static int warp() { return threadIdx.x / kWarp; }

  // Whole units of 4 KiB from an address that is a multiple of 16 bytes: a thread has several
  // neighbouring lanes of one strip, kVector of them, which come in one access. Returns how many
  // elements are done.
  template <bool kClamp>
  FUSEDOPT_DEVICE int add_units(const Storage* grad, int length) {
    const int units = length / kUnit;
    const Storage* const own =
        grad + thread() / kThreadsOfStrip * kStrip + thread() % kThreadsOfStrip * kVector;
#pragma unroll 1
    for (int unit = warp(); unit < units; unit += kWarps) {
      uint4 raw[kStripRows];
#pragma unroll
      for (int row = 0; row < kStripRows; ++row) {
        raw[row] = load_raw(own + unit * kUnit + row * kLanes);
      }
      double lanes[kVector] = {};
#pragma unroll
      for (int row = 0; row < kStripRows; ++row) {
        judge_.see(raw[row]);
        T values[kVector];
        unpack<Storage>(raw[row], values);
#pragma unroll
        for (int i = 0; i < kVector; ++i) lanes[i] = add_one<kClamp>(values[i], lanes[i]);
      }
#pragma unroll
      for (int count = kVector / 2; count > 0; count /= 2) {
#pragma unroll
        for (int i = 0; i < count; ++i) lanes[i] = lanes[2 * i] + lanes[2 * i + 1];
      }
      leave<kUnit / kGranule>(lanes[0], unit);
    }
    return units * kUnit;
  }

  // Elements [begin, length), read one by one at `place(index)`: two strips a warp, a lane a
  // thread.
  template <bool kClamp, int kAtOnce, typename Place>
  FUSEDOPT_DEVICE void add_singles(const OperandAccess<Storage>& grad, int begin, int length,
                                   Place place) {
    const int granules = (length + kGranule - 1) / kGranule;
#pragma unroll 1
    for (int granule = begin / kGranule + warp(); granule < granules; granule += kWarps) {
      const int first = granule * kGranule + thread() / kLanes * kStrip + thread() % kLanes;
      double sum = 0.0;
#pragma unroll 1
      for (int row = 0; row < kStripRows; row += kAtOnce) {
        T values[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int at = first + (row + i) * kLanes;
          if (at < length) grad.fetch(place(at), values[i]);
        }
        grad.settle(values, false);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + (row + i) * kLanes >= length) break;
          judge_.see(values[i]);
          sum = add_one<kClamp>(values[i], sum);
        }
      }
      leave<1>(sum, granule);
    }
  }

  template <bool kClamp>
  FUSEDOPT_DEVICE double add_one(T raw, double sum) const {
    const T x = raw * unscale_;
    return add_square(kClamp ? clamp_value(x, max_value_) : x, sum);
  }

  // Adds up the threads' sums of the `index`th run of kCount granules.
  template <int kCount>
  FUSEDOPT_DEVICE void leave(double own, int index) {
    const double sum = add_neighbouring_threads(own);
    if (thread() < kCount) sums_[index * kCount + thread()] = thread() == 0 ? sum : 0.0;
  }

  T unscale_;
  T max_value_;
  double* sums_;
  Judge<Storage> judge_;
};

}  // namespace fusedopt::cuda
