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

// The larger of the two; NaN in either comes through (CUDA's fmaxf would drop it).
template <typename T>
FUSEDOPT_HD T maximum(T a, T b) {
  return (a > b || a != a) ? a : b;
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

// The hyperparameters that open every rule's row, in this order.
struct CommonHyper {
  double lr;
  double weight_decay;
  double decoupled_weight_decay;  // 0 or 1
  double maximize;                // 0 or 1
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
  FUSEDOPT_HD void operator()(T& param, T& grad) const {
    grad = sign * grad;
    grad = l2 != T(0) ? grad + l2 * param : grad;
    param = param * shrink;
  }
};

}  // namespace fusedopt::rules
