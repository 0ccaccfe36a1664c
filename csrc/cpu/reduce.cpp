// The reduce pass for one instruction set (FUSEDOPT_ISA): reads gradients once; leaves for every
// piece the sum of squares and whether any element was inf or nan.
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>

#include "core/control.h"
#include "core/sum_order.h"
#include "cpu/kernels.h"
#include "cpu/operand.h"

namespace fusedopt::cpu {
namespace FUSEDOPT_ISA {
namespace {

// Floats widened to double at a time.
constexpr int kWiden = 4;
// The vector registers in use. 512-bit ones were no faster.
#ifdef __AVX2__
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using type = uint32_t;
  static constexpr type kMagnitude = 0x7fffffffu;
  static constexpr type kInfinity = 0x7f800000u;
};
template <>
struct Bits<double> {
  using type = uint64_t;
  static constexpr type kMagnitude = 0x7fffffffffffffffu;
  static constexpr type kInfinity = 0x7ff0000000000000u;
};

// sum += value^2 in double. The square of a float is exact there, so a fused multiply-add has the
// same bits as two operations.
template <typename Values, typename Wide>
inline __attribute__((always_inline)) void add_square(const Values& value, Wide& sum) {
  const Wide wide = __builtin_convertvector(value, Wide);
  sum += wide * wide;
}
#ifdef __AVX2__
// g++ 12 lowers __builtin_convertvector to two conversions of half the width.
inline void add_square(__m128 value, __m256d& sum) {
  const __m256d wide = _mm256_cvtps_pd(value);
  sum = _mm256_fmadd_pd(wide, wide, sum);
}
#endif

// From sixteen values the sums of four neighbours each, as add_neighbours makes them.
#ifdef __AVX2__
inline void add_fours(const double* from, double* to) {
  const __m256d low = _mm256_hadd_pd(_mm256_loadu_pd(from), _mm256_loadu_pd(from + 4));
  const __m256d high = _mm256_hadd_pd(_mm256_loadu_pd(from + 8), _mm256_loadu_pd(from + 12));
  _mm256_storeu_pd(
      to, _mm256_permute2f128_pd(low, high, 0x20) + _mm256_permute2f128_pd(low, high, 0x31));
}
#else
inline void add_fours(const double* from, double* to) {
  for (int i = 0; i < 4; ++i, from += 4) to[i] = (from[0] + from[1]) + (from[2] + from[3]);
}
#endif

// The lanes of one strip. The loop is written with the compiler's own vector types: left to itself,
// g++ 12 does not vectorise sixteen running sums.
template <typename T>
struct Lanes {
  static constexpr int kWidth = kRegisterBytes / sizeof(T);
  static constexpr int kFew = kWidth < kWiden ? kWidth : kWiden;
  static constexpr int kVectors = kLanes / kWidth;
  typedef T Values __attribute__((vector_size(kWidth * sizeof(T))));
  typedef typename Bits<T>::type Magnitudes __attribute__((vector_size(kWidth * sizeof(T))));
  typedef T Few __attribute__((vector_size(kFew * sizeof(T))));
  typedef double Wide __attribute__((vector_size(kFew * sizeof(double))));

  Wide sum[kLanes / kFew] = {};

  // Adds a row; kClamp: limits each element to +-max_value first. `largest` collects magnitude
  // bits, of which those of inf and nan are the largest.
  template <bool kClamp>
  inline void add(const T* grad, const Values (&unscale)[kVectors], T max_value,
                  Magnitudes (&largest)[kVectors]) {
    for (int k = 0; k < kVectors; ++k) {
      Values raw;
      memcpy(&raw, grad + k * kWidth, sizeof(raw));
      const Magnitudes magnitude = reinterpret_cast<Magnitudes>(raw) & Bits<T>::kMagnitude;
      largest[k] = magnitude > largest[k] ? magnitude : largest[k];
      Values value = raw * unscale[k];
      if constexpr (kClamp) {
        const Values limit = max_value - Values{};
        value = value > limit ? limit : value;
        value = value < -limit ? -limit : value;
      }
      Few few[kWidth / kFew];
      memcpy(few, &value, sizeof(few));
      for (int j = 0; j < kWidth / kFew; ++j) {
        add_square(few[j], sum[k * (kWidth / kFew) + j]);
      }
    }
  }
};

// The strips of one piece.
template <bool kClamp, typename T>
class Strips {
 public:
  Strips(T unscale, T max_value) : max_value_(max_value) { std::fill_n(factors_, kLanes, unscale); }

  // Adds `count` elements, all of a strip but in the last one of a piece.
  void add(const T* grad, int count) {
    // One stream of reads alone leaves most of the memory's bandwidth unused: the hardware's
    // prefetcher stops at every page. Asking for the next page's lines made the pass 1.4 times as
    // fast.
    constexpr int kAhead = 4096 / sizeof(T);
    Values unscale[Lanes<T>::kVectors];
    Magnitudes largest[Lanes<T>::kVectors];
    memcpy(unscale, factors_, sizeof(unscale));
    memcpy(largest, largest_, sizeof(largest));
    for (; count >= kStrip; count -= kStrip, grad += kStrip) {
      Lanes<T> lanes;
      for (int row = 0; row < kStripRows; ++row) {
        __builtin_prefetch(grad + row * kLanes + kAhead);
        lanes.template add<kClamp>(grad + row * kLanes, unscale, max_value_, largest);
      }
      finish(lanes);
    }
    if (count > 0) {
      Lanes<T> lanes;
      for (; count >= kLanes; count -= kLanes, grad += kLanes) {
        lanes.template add<kClamp>(grad, unscale, max_value_, largest);
      }
      if (count > 0) {
        // What pads the last row is multiplied by 0: times infinity it would be nan.
        T rest[kLanes] = {};
        memcpy(rest, grad, count * sizeof(T));
        std::fill_n(factors_ + count, kLanes - count, T(0));
        memcpy(unscale, factors_, sizeof(unscale));
        lanes.template add<kClamp>(rest, unscale, max_value_, largest);
      }
      finish(lanes);
    }
    memcpy(largest_, largest, sizeof(largest));
  }

  double sum_squares() {
    for (; count_ % 16 == 0 && count_ > 0; count_ /= 4) {
      for (int i = 0; i < count_; i += 16) add_fours(fours_ + i, fours_ + i / 4);
    }
    return add_neighbours(fours_, count_);
  }

  bool nonfinite() const {
    return std::any_of(largest_, largest_ + kLanes,
                       [](auto bits) { return bits >= Bits<T>::kInfinity; });
  }

 private:
  using Values = typename Lanes<T>::Values;
  using Magnitudes = typename Lanes<T>::Magnitudes;

  void finish(const Lanes<T>& lanes) {
    double values[kLanes];
    memcpy(values, lanes.sum, sizeof(values));
    add_fours(values, fours_ + count_);
    count_ += kLanes / 4;
  }

  T max_value_;
  T factors_[kLanes];
  typename Bits<T>::type largest_[kLanes] = {};
  int count_ = 0;
  double fours_[kPieceLength / kStripRows / 4];  // sums of four neighbouring lanes
};

template <bool kClamp, typename T>
Partial reduce_piece(const TensorRow& row, const Piece& piece, T unscale, T max_value) {
  const Array<T> grad{row.grad, row.layout, 1};
  const int most = grad.in_place() ? kPieceLength : kBlock;
  static_assert(kBlock % kStrip == 0);
  T buffer[kBlock];
  Strips<kClamp, T> strips(unscale, max_value);
  for (int at = 0; at < piece.length; at += most) {
    const int count = std::min(most, piece.length - at);
    strips.add(grad.read(piece.begin + at, count, buffer), count);
  }
  return {strips.sum_squares(), strips.nonfinite()};
}

template <typename T>
Partial reduce_piece(const TensorRow& row, const Piece& piece, double unscale, double max_value) {
  const auto reduce = std::isinf(max_value) ? reduce_piece<false, T> : reduce_piece<true, T>;
  return reduce(row, piece, T(unscale), T(max_value));
}

}  // namespace

void reduce(const Job& job, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const Piece& piece = job.table.pieces[i];
    const TensorRow& row = job.table.tensors[piece.tensor];
    if (row.grad.data == nullptr) continue;
    const double max_value = job.table.groups[row.group].max_grad_value;
    const double unscale = job.control.unscale;
    job.partials[i] = computes_in_float64(row)
                          ? reduce_piece<double>(row, piece, unscale, max_value)
                          : reduce_piece<float>(row, piece, unscale, max_value);
  }
}

// The apply loops of this instruction set, in the order of all_rules().
#define FUSEDOPT_RULE(rule) void apply_##rule(const Job& job, int64_t first, int64_t last);
#include "rules_list.inc"
#undef FUSEDOPT_RULE
extern const PieceLoop kApply[] = {
#define FUSEDOPT_RULE(rule) apply_##rule,
#include "rules_list.inc"
#undef FUSEDOPT_RULE
};

}  // namespace FUSEDOPT_ISA
}  // namespace fusedopt::cpu
