// Adam (Kingma & Ba 2015, arXiv:1412.6980), AMSGrad (Reddi et al. 2018, arXiv:1904.09237) and, with
// decoupled decay, AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101).
#pragma once

#include "rules/common.h"

namespace fusedopt::rules {

struct adam {
  static constexpr int kAmsgrad = 1;
  static constexpr int kVariants = 2;
  static constexpr std::array<const char*, 7> kHyperNames = {
      "lr", "weight_decay", "decoupled_weight_decay", "maximize", "betas.0", "betas.1", "eps"};
  static constexpr std::array<const char*, 1> kVariantNames = {"amsgrad"};
  static constexpr std::array<StateName, 3> kStateNames = {
      {{"exp_avg", 0}, {"exp_avg_sq", 0}, {"max_exp_avg_sq", kAmsgrad}}};

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
    T one_minus_beta2;
    T inv_root_correction;  // 1 / sqrt(1 - beta2^t)
    T eps;
    T step_size;  // lr / (1 - beta1^t)

    FUSEDOPT_HD Constants(const Hyper& h, double step)
        : open(h.common),
          lerp_avg(1.0 - h.beta1),
          beta2(T(h.beta2)),
          one_minus_beta2(T(1.0 - h.beta2)),
          inv_root_correction(T(1.0 / root(1.0 - power(h.beta2, step)))),
          eps(T(h.eps)),
          step_size(T(h.common.lr / (1.0 - power(h.beta1, step)))) {}
  };

  template <int kVariant, typename T, int kStates>
  static FUSEDOPT_HD void update(const Constants<T>& c, T& param, T grad, T (&state)[kStates]) {
    T& exp_avg = state[0];
    T& exp_avg_sq = state[1];
    c.open(param, grad);
    exp_avg = c.lerp_avg(exp_avg, grad);
    exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * grad * grad;
    T second_moment = exp_avg_sq;
    if constexpr (kVariant & kAmsgrad) {
      T& max_exp_avg_sq = state[2];
      max_exp_avg_sq = maximum(max_exp_avg_sq, exp_avg_sq);
      second_moment = max_exp_avg_sq;
    }
    const T denom = root(second_moment) * c.inv_root_correction + c.eps;
    param = param - c.step_size * exp_avg / denom;
  }
};

}  // namespace fusedopt::rules
