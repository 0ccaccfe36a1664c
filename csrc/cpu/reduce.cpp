// The reduce pass for one instruction set (FUSEDOPT_ISA): reads gradients once; leaves for every
// piece the sum of squares and whether any element was inf or nan.
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cmath>

#include "core/control.h"
#include "cpu/kernels.h"
#include "cpu/operand.h"

namespace fusedopt::cpu {
namespace FUSEDOPT_ISA {
namespace {

// Element i of a piece adds to lane i % kLanes, whatever the instruction set: the sum has one
// order.
constexpr int kLanes = 16;
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

// The loop is written with the compiler's own vector types: left to itself, g++ 12 does not
// vectorise sixteen running sums. `largest` holds magnitude bits, of which those of inf and nan are
// the largest.
template <typename T>
struct Lanes {
  static constexpr int kWidth = kRegisterBytes / sizeof(T);
  static constexpr int kFew = kWidth < kWiden ? kWidth : kWiden;
  typedef T Values __attribute__((vector_size(kWidth * sizeof(T))));
  typedef typename Bits<T>::type Magnitudes __attribute__((vector_size(kWidth * sizeof(T))));
  typedef T Few __attribute__((vector_size(kFew * sizeof(T))));
  typedef double Wide __attribute__((vector_size(kFew * sizeof(double))));

  Wide sum[kLanes / kFew] = {};
  Magnitudes largest[kLanes / kWidth] = {};

  // Adds kLanes elements; kClamp: limits each to +-max_value first.
  template <bool kClamp>
  inline void add(const T* grad, T unscale, T max_value) {
    for (int k = 0; k < kLanes / kWidth; ++k) {
      Values raw;
      memcpy(&raw, grad + k * kWidth, sizeof(raw));
      const Magnitudes magnitude = reinterpret_cast<Magnitudes>(raw) & Bits<T>::kMagnitude;
      largest[k] = magnitude > largest[k] ? magnitude : largest[k];
      Values value = raw * unscale;
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

  double sum_squares() const {
    double total = 0.0;
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane / kFew][lane % kFew];
    return total;
  }

  bool nonfinite() const {
    bool found = false;
    for (int lane = 0; lane < kLanes; ++lane) {
      found |= largest[lane / kWidth][lane % kWidth] >= Bits<T>::kInfinity;
    }
    return found;
  }
};

template <bool kClamp, typename T>
void add_block(const T* grad, int count, T unscale, T max_value, Lanes<T>& lanes) {
  // One stream of reads alone leaves most of the memory's bandwidth unused: the hardware's
  // prefetcher stops at every page. Asking for the next page's lines made the pass 1.4 times as
  // fast.
  constexpr int kAhead = 4096 / sizeof(T);
  Lanes<T> local = lanes;
  const int full = count - count % kLanes;
  for (int i = 0; i < full; i += kLanes) {
    __builtin_prefetch(grad + i + kAhead);
    local.template add<kClamp>(grad + i, unscale, max_value);
  }
  if (full < count) {
    T rest[kLanes] = {};
    memcpy(rest, grad + full, (count - full) * sizeof(T));
    local.template add<kClamp>(rest, unscale, max_value);
  }
  lanes = local;
}

template <typename T>
Partial reduce_piece(const TensorRow& row, const Piece& piece, T unscale, T max_value) {
  const Operand<T> grad = grad_operand<T>(row);
  const auto add = std::isinf(max_value) ? add_block<false, T> : add_block<true, T>;
  T buffer[kBlock];
  Lanes<T> lanes;
  const int64_t end = piece.begin + piece.length;
  for (int64_t at = piece.begin; at < end;) {
    const int count = block_length(!grad.in_place(), end - at);
    add(grad.read(at, count, buffer), count, unscale, max_value, lanes);
    at += count;
  }
  return {lanes.sum_squares(), lanes.nonfinite()};
}

}  // namespace

void reduce(const Job& job, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    const Piece& piece = job.table.pieces[i];
    const TensorRow& row = job.table.tensors[piece.tensor];
    if (row.grad == nullptr) continue;
    const double max_value = job.table.groups[row.group].max_grad_value;
    const double unscale = job.control.unscale;
    job.partials[i] = row.param_type == DType::kFloat64
                          ? reduce_piece<double>(row, piece, unscale, max_value)
                          : reduce_piece<float>(row, piece, float(unscale), float(max_value));
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
