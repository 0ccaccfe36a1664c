// Adagrad (Duchi, Hazan & Singer 2011, JMLR 12) with torch.optim.Adagrad's learning rate decay lr /
// (1 + (t - 1) lr_decay).
#pragma once

#include "rules/common.h"

namespace fusedopt::rules {

struct adagrad {
  static constexpr int kVariants = 1;
  static constexpr std::array<const char*, 6> kHyperNames = {
      "lr", "weight_decay", "decoupled_weight_decay", "maximize", "lr_decay", "eps"};
  static constexpr std::array<const char*, 0> kVariantNames = {};
  static constexpr std::array<StateName, 1> kStateNames = {{{"sum", 0}}};

  struct Hyper {
    CommonHyper common;
    double lr_decay;
    double eps;
  };

  template <typename T>
  struct Constants {
    Opening<T> open;
    T decayed_lr;
    T eps;

    FUSEDOPT_HD Constants(const Hyper& h, double step)
        : open(h.common),
          decayed_lr(T(h.common.lr / (1.0 + (step - 1.0) * h.lr_decay))),
          eps(T(h.eps)) {}
  };

  template <int kVariant, typename T, int kStates>
  static FUSEDOPT_HD void update(const Constants<T>& c, T& param, T grad, T (&state)[kStates]) {
    T& sum = state[0];
    c.open(param, grad);
    sum = sum + grad * grad;
    param = param - c.decayed_lr * grad / (root(sum) + c.eps);
  }
};

}  // namespace fusedopt::rules
