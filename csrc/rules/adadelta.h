// Adadelta (Zeiler 2012, arXiv:1212.5701): eps stands inside both roots, acc_delta is updated after
// the step is computed.
#pragma once

#include "rules/common.h"

namespace fusedopt::rules {

struct adadelta {
  static constexpr int kVariants = 1;
  static constexpr std::array<const char*, 6> kHyperNames = {
      "lr", "weight_decay", "decoupled_weight_decay", "maximize", "rho", "eps"};
  static constexpr std::array<const char*, 0> kVariantNames = {};
  static constexpr std::array<StateName, 2> kStateNames = {{{"square_avg", 0}, {"acc_delta", 0}}};

  struct Hyper {
    CommonHyper common;
    double rho;
    double eps;
  };

  template <typename T>
  struct Constants {
    Opening<T> open;
    T lr;
    T rho;
    T one_minus_rho;
    T eps;

    FUSEDOPT_HD Constants(const Hyper& h, double /*step*/)
        : open(h.common),
          lr(T(h.common.lr)),
          rho(T(h.rho)),
          one_minus_rho(T(1.0 - h.rho)),
          eps(T(h.eps)) {}
  };

  template <int kVariant, typename T, int kStates>
  static FUSEDOPT_HD void update(const Constants<T>& c, T& param, T grad, T (&state)[kStates]) {
    T& square_avg = state[0];
    T& acc_delta = state[1];
    c.open(param, grad);
    square_avg = c.rho * square_avg + c.one_minus_rho * grad * grad;
    const T delta = root(acc_delta + c.eps) / root(square_avg + c.eps) * grad;
    acc_delta = c.rho * acc_delta + c.one_minus_rho * delta * delta;
    param = param - c.lr * delta;
  }
};

}  // namespace fusedopt::rules
