// Lion (Chen et al. 2023, arXiv:2302.06675): the step is the sign of one moving average, the state
// another; weight decay is always decoupled.
#pragma once

#include "rules/common.h"

namespace fusedopt::rules {

struct lion {
  static constexpr int kVariants = 1;
  static constexpr std::array<const char*, 6> kHyperNames = {
      "lr", "weight_decay", "decoupled_weight_decay", "maximize", "betas.0", "betas.1"};
  static constexpr std::array<const char*, 0> kVariantNames = {};
  static constexpr std::array<StateName, 1> kStateNames = {{{"exp_avg", 0}}};

  struct Hyper {
    CommonHyper common;
    double beta1;
    double beta2;
  };

  template <typename T>
  struct Constants {
    Opening<T> open;
    T lr;
    Lerp<T> lerp_direction;  // 1 - beta1
    Lerp<T> lerp_avg;        // 1 - beta2

    FUSEDOPT_HD Constants(const Hyper& h, double /*step*/)
        : open(CommonHyper{h.common.lr, h.common.weight_decay, 1.0, h.common.maximize}),
          lr(T(h.common.lr)),
          lerp_direction(1.0 - h.beta1),
          lerp_avg(1.0 - h.beta2) {}
  };

  template <int kVariant, typename T, int kStates>
  static FUSEDOPT_HD void update(const Constants<T>& c, T& param, T grad, T (&state)[kStates]) {
    T& exp_avg = state[0];
    c.open(param, grad);
    const T direction = c.lerp_direction(exp_avg, grad);
    param = param - c.lr * sign_of(direction);
    exp_avg = c.lerp_avg(exp_avg, grad);
  }
};

}  // namespace fusedopt::rules
