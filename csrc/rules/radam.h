// RAdam (Liu et al. 2020, arXiv:1908.03265): Adam whose step has no denominator while the second
// moment rests on too few gradients. As in torch.optim.RAdam eps is added to the plain root, before
// the bias correction.
#pragma once

#include "rules/common.h"

namespace fusedopt::rules {

struct radam {
  static constexpr int kVariants = 1;
  static constexpr std::array<const char*, 7> kHyperNames = {
      "lr", "weight_decay", "decoupled_weight_decay", "maximize", "betas.0", "betas.1", "eps"};
  static constexpr std::array<const char*, 0> kVariantNames = {};
  static constexpr std::array<StateName, 2> kStateNames = {{{"exp_avg", 0}, {"exp_avg_sq", 0}}};

  struct Hyper {
    CommonHyper common;
    double beta1;
    double beta2;
    double eps;
  };

  // What an average of `step` gradients says of their variance: nothing up to a length of 5.
  struct Rectification {
    double length;  // rho_t
    double factor;  // r_t sqrt(1 - beta2^t); 1 where the denominator is left out

    FUSEDOPT_HD Rectification(double beta2, double step) {
      const double decayed = precise_power(beta2, step);
      const double correction = 1.0 - decayed;
      const double longest = 2.0 / (1.0 - beta2) - 1.0;  // rho_inf
      length = longest - 2.0 * step * decayed / correction;
      const double variance =
          (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length);
      factor = length > 5.0 ? root(variance) * root(correction) : 1.0;
    }
  };

  template <typename T>
  struct Constants {
    Opening<T> open;
    Lerp<T> lerp_avg;  // 1 - beta1
    T beta2;
    T one_minus_beta2;
    T eps;
    T rectified;
    T step_size;  // lr / (1 - beta1^t), times the rectification

    FUSEDOPT_HD Constants(const Hyper& h, double step)
        : Constants(h, step, Rectification(h.beta2, step)) {}

   private:
    FUSEDOPT_HD Constants(const Hyper& h, double step, const Rectification& rectification)
        : open(h.common),
          lerp_avg(1.0 - h.beta1),
          beta2(T(h.beta2)),
          one_minus_beta2(T(1.0 - h.beta2)),
          eps(T(h.eps)),
          rectified(T(rectification.length > 5.0 ? 1.0 : 0.0)),
          step_size(T(h.common.lr / (1.0 - power(h.beta1, step)) * rectification.factor)) {}
  };

  template <int kVariant, typename T, int kStates>
  static FUSEDOPT_HD void update(const Constants<T>& c, T& param, T grad, T (&state)[kStates]) {
    T& exp_avg = state[0];
    T& exp_avg_sq = state[1];
    c.open(param, grad);
    exp_avg = c.lerp_avg(exp_avg, grad);
    exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * grad * grad;
    const T denom = c.rectified != T(0) ? root(exp_avg_sq) + c.eps : T(1);
    param = param - c.step_size * exp_avg / denom;
  }
};

}  // namespace fusedopt::rules
