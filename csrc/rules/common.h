// What every rule shares: the two ways to decay weights, the sign for `maximize`, and the few
// helpers whose bits must be the same in every compiler. Used by the rules only. Constants that
// choose are numbers, not bools: g++ vectorises a select on a comparison of numbers and not one on
// a bool from outside the loop.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define FUSEDOPT_HD __host__ __device__ __forceinline__
#else
#define FUSEDOPT_HD inline __attribute__((always_inline))
#endif

namespace fusedopt::rules {

// A state tensor of a rule: its name in torch's state dict and the variant bit without which it
// does not exist (0: always).
struct StateName {
  const char* name;
  int variant_bit;
};

// How many state tensors a variant of a rule has, and where the named one stands among them.
template <typename Rule>
constexpr int count_states(int variant) {
  int count = 0;
  for (const StateName& state : Rule::kStateNames)
    count += (state.variant_bit & variant) == state.variant_bit;
  return count;
}

// A number of a parameter's besides its counter of steps, in float64 or, if narrow, in float32.
struct Scalar {
  double value;
  bool narrow;

  // What is left of a number when it is kept here.
  FUSEDOPT_HD double kept(double x) const {
    return narrow ? static_cast<double>(static_cast<float>(x)) : x;
  }
};

template <int kCount>
struct Scalars {
  Scalar values[kCount];

  FUSEDOPT_HD Scalar& operator[](int i) { return values[i]; }
  FUSEDOPT_HD const Scalar& operator[](int i) const { return values[i]; }
};
template <>
struct Scalars<0> {};

// The names of a rule's scalars in torch's state dict. A rule that has some lists them as
// kScalarNames, is given their values before the step as `Constants(hyper, step, scalars)`, and
// says in `advance(hyper, step, scalars)` what the step makes of them.
template <typename Rule, typename = void>
constexpr std::array<const char*, 0> kScalarNamesOf{};
template <typename Rule>
constexpr auto kScalarNamesOf<Rule, std::void_t<decltype(Rule::kScalarNames)>> = Rule::kScalarNames;

template <typename Rule>
constexpr int kScalarCount = static_cast<int>(kScalarNamesOf<Rule>.size());

FUSEDOPT_HD float root(float x) { return sqrtf(x); }
FUSEDOPT_HD double root(double x) { return sqrt(x); }

// base^exponent for a base in [0, 1] and an exponent from 0 up, infinity and NaN included: by
// repeated squaring, and for a fraction by repeated roots. In double and + - * / sqrt only, so that
// C++ and Triton agree to the last bit.
FUSEDOPT_HD double power(double base, double exponent) {
  constexpr double kEndless = 0x1p62;  // such a power is 0, or 1
  if (exponent != exponent) return exponent;
  const int64_t whole = static_cast<int64_t>(exponent < kEndless ? exponent : kEndless);
  double fraction = exponent < kEndless ? exponent - static_cast<double>(whole) : 0.0;
  double result = 1.0;
  for (double part = root(base); fraction > 0.0; part = root(part)) {
    fraction *= 2.0;
    if (fraction >= 1.0) {
      result *= part;
      fraction -= 1.0;
    }
  }
  for (int64_t n = whole; n > 0; n >>= 1) {
    if (n & 1) result *= base;
    base *= base;
  }
  return result;
}

// A number to twice the precision of double: what one double holds of it, and the rest.
struct Twofold {
  double high;
  double low;
};

// The product, by Dekker 1971 (Numerische Mathematik 18): without fused operations, and exact but
// for the last bits of `low`.
FUSEDOPT_HD Twofold multiply(const Twofold& a, const Twofold& b) {
  constexpr double kSplit = 0x1p27 + 1.0;
  const double a_upper = kSplit * a.high - (kSplit * a.high - a.high);
  const double b_upper = kSplit * b.high - (kSplit * b.high - b.high);
  const double a_lower = a.high - a_upper;
  const double b_lower = b.high - b_upper;
  const double product = a.high * b.high;
  const double rest = a_upper * b_upper - product + a_upper * b_lower + a_lower * b_upper +
                      a_lower * b_lower + (a.high * b.low + a.low * b.high);
  const double high = product + rest;
  return {high, rest - (high - product)};
}

// The same as power, rounded once where the exponent is a whole number: as C libraries have it, for
// what is left after a cancellation.
FUSEDOPT_HD double precise_power(double base, double exponent) {
  constexpr double kUncounted = 0x1p52;  // beyond what any counter reaches
  if (!(exponent < kUncounted)) return power(base, exponent);
  const int64_t whole = static_cast<int64_t>(exponent);
  Twofold result = {1.0, 0.0};
  Twofold factor = {base, 0.0};
  for (int64_t n = whole; n > 0; n >>= 1) {
    if (n & 1) result = multiply(result, factor);
    factor = multiply(factor, factor);
  }
  return result.high * power(base, exponent - static_cast<double>(whole));
}

// The larger of the two; NaN in either comes through (CUDA's fmaxf would drop it).
template <typename T>
FUSEDOPT_HD T maximum(T a, T b) {
  return (a > b || a != a) ? a : b;
}

// 1, -1 or 0; as torch.sign has it, 0 for NaN.
template <typename T>
FUSEDOPT_HD T sign_of(T x) {
  return x > T(0) ? T(1) : (x < T(0) ? T(-1) : T(0));
}

// An exponential moving average's weights, as torch.lerp forms them: the side with the smaller
// weight is the correction.
template <typename T>
struct Lerp {
  T weight;
  T complement;

  FUSEDOPT_HD explicit Lerp(double w) : weight(T(w)), complement(T(1.0 - w)) {}
  FUSEDOPT_HD T operator()(T start, T end) const {
    const T difference = end - start;
    return weight < T(0.5) ? start + weight * difference : end - difference * complement;
  }
};

// The hyperparameters that open a rule's row, in this order.
struct CommonHyper {
  double lr;
  double weight_decay;
  double decoupled_weight_decay;  // 0 or 1
  double maximize;                // 0 or 1
};

// Those that open the row of a rule without weight decay.
struct UndecayedHyper {
  double lr;
  double maximize;  // 0 or 1
};

// The opening of every rule: g <- -g to maximize; then either p <- p (1 - lr wd) (decoupled,
// Loshchilov & Hutter 2019, arXiv:1711.05101) or g <- g + wd p (L2).
template <typename T>
struct Opening {
  T shrink;
  T l2;
  T sign;

  FUSEDOPT_HD explicit Opening(const CommonHyper& h)
      : shrink(T(h.decoupled_weight_decay != 0.0 ? 1.0 - h.lr * h.weight_decay : 1.0)),
        l2(T(h.decoupled_weight_decay != 0.0 ? 0.0 : h.weight_decay)),
        sign(T(h.maximize != 0.0 ? -1.0 : 1.0)) {}
  FUSEDOPT_HD explicit Opening(const UndecayedHyper& h)
      : Opening(CommonHyper{h.lr, 0.0, 0.0, h.maximize}) {}
  FUSEDOPT_HD void operator()(T& param, T& grad) const {
    grad = sign * grad;
    grad = l2 != T(0) ? grad + l2 * param : grad;
    param = param * shrink;
  }
};

}  // namespace fusedopt::rules
