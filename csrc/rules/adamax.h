// Adamax (Kingma & Ba 2015, arXiv:1412.6980, section 7.1): Adam with the infinity norm, and eps
// where torch.optim.Adamax adds it, to the gradient's magnitude.
#pragma once

#include "rules/common.h"

namespace fusedopt::rules {

struct adamax {
  static constexpr int kVariants = 1;
  static constexpr std::array<const char*, 7> kHyperNames = {
      "lr", "weight_decay", "decoupled_weight_decay", "maximize", "betas.0", "betas.1", "eps"};
  static constexpr std::array<const char*, 0> kVariantNames = {};
  static constexpr std::array<StateName, 2> kStateNames = {{{"exp_avg", 0}, {"exp_inf", 0}}};

  struct Hyper {
    CommonHyper common;
    double beta1;
    double beta2;
    double eps;
  };

  template <typename T>
  struct Constants {
    Opening<T> open;
    Lerp<T> lerp_avg;  // 1 - beta1
    T beta2;
    T eps;
    T step_size;  // lr / (1 - beta1^t)

    FUSEDOPT_HD Constants(const Hyper& h, double step)
        : open(h.common),
          lerp_avg(1.0 - h.beta1),
          beta2(T(h.beta2)),
          eps(T(h.eps)),
          step_size(T(h.common.lr / (1.0 - power(h.beta1, step)))) {}
  };

  template <int kVariant, typename T, int kStates>
  static FUSEDOPT_HD void update(const Constants<T>& c, T& param, T grad, T (&state)[kStates]) {
    T& exp_avg = state[0];
    T& exp_inf = state[1];
    c.open(param, grad);
    exp_avg = c.lerp_avg(exp_avg, grad);
    const T magnitude = grad < T(0) ? -grad : grad;
    exp_inf = maximum(c.beta2 * exp_inf, magnitude + c.eps);
    param = param - c.step_size * exp_avg / exp_inf;
  }
};

}  // namespace fusedopt::rules
