// The arithmetic between the passes: from sums of squares to clip coefficients and the step
// control, once for CPU and CUDA. A limit that is infinite is none.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/table.h"

namespace fusedopt {

// torch.nn.utils.clip_grad_norm_'s coefficient, min(1, max_norm / (norm + 1e-6)), with NaN coming
// through.
FUSEDOPT_NUMBERS_HD double clip_coefficient(double norm, double max_norm) {
  if (max_norm == INFINITY) return 1.0;
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

// What a tensor's own limit makes of its norm.
struct ParamClip {
  double coefficient;
  double sum_squares;  // what is left of it
};

// Without a limit the sum stays as it is: the square of its root would differ in the last bit.
FUSEDOPT_NUMBERS_HD ParamClip clip_by_param(double sum_squares, double max_norm) {
  if (max_norm == INFINITY) return {1.0, sum_squares};
  const double norm = sqrt(sum_squares);
  const double coefficient = clip_coefficient(norm, max_norm);
  return {coefficient, (norm * coefficient) * (norm * coefficient)};
}

// Of all gradients, after unscaling and the clips by value and parameter.
FUSEDOPT_NUMBERS_HD StepControl settle(double unscale, double sum_squares, bool nonfinite,
                                       bool found_inf, double max_grad_norm, bool skip_nonfinite) {
  const double norm = sqrt(sum_squares);
  const bool skip = found_inf || (skip_nonfinite && nonfinite);
  return {unscale, clip_coefficient(norm, max_grad_norm), norm, nonfinite ? 1.0 : 0.0,
          skip ? 1.0 : 0.0};
}

// Whether any group limits its parameters' norms, or values.
inline bool clips_by_param(const GroupRow* groups, int64_t count) {
  return std::any_of(groups, groups + count, [](const GroupRow& group) {
    return group.max_grad_norm_per_param != INFINITY;
  });
}
inline bool clips_by_value(const GroupRow* groups, int64_t count) {
  return std::any_of(groups, groups + count,
                     [](const GroupRow& group) { return group.max_grad_value != INFINITY; });
}

// x limited to [-limit, limit]; NaN comes through. GPUs have an instruction for each comparison of
// floats that lets it.
template <typename T>
FUSEDOPT_NUMBERS_HD T clamp_value(T x, T limit) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == sizeof(float)) {
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(limit));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(-limit));
    return x;
  }
#endif
  x = x > limit ? limit : x;
  return x < -limit ? -limit : x;
}

// What the apply pass does to every gradient element before the rule sees it, each factor rounded
// once to the rule's precision: unscale, clamp by value, clip by the parameter's own norm, clip by
// the global norm.
template <typename T>
struct GradTransform {
  T unscale;
  T max_value;
  T param_clip;
  T global_clip;

  FUSEDOPT_NUMBERS_HD T operator()(T grad) const {
    return clamp_value(grad * unscale, max_value) * param_clip * global_clip;
  }

  // The same where nothing clamps; and whether that does anything.
  FUSEDOPT_NUMBERS_HD T scaled(T grad) const { return grad * unscale * param_clip * global_clip; }
  FUSEDOPT_NUMBERS_HD bool clamps() const { return max_value != T(INFINITY); }
  FUSEDOPT_NUMBERS_HD bool scales() const {
    return unscale != T(1) || param_clip != T(1) || global_clip != T(1);
  }
};

}  // namespace fusedopt
