// Stochastic gradient descent with momentum (Polyak 1964), dampening and Nesterov's look-ahead in
// the form of Sutskever et al. 2013 that torch.optim.SGD uses.
#pragma once

#include "rules/common.h"

namespace fusedopt::rules {

struct sgd {
  static constexpr int kMomentum = 1;
  static constexpr int kVariants = 2;
  static constexpr std::array<const char*, 7> kHyperNames = {
      "lr",        "weight_decay", "decoupled_weight_decay", "maximize", "momentum",
      "dampening", "nesterov"};
  static constexpr std::array<const char*, 1> kVariantNames = {"momentum"};
  static constexpr std::array<StateName, 1> kStateNames = {{{"momentum_buffer", kMomentum}}};

  struct Hyper {
    CommonHyper common;
    double momentum;
    double dampening;
    double nesterov;  // 0 or 1
  };

  template <typename T>
  struct Constants {
    Opening<T> open;
    T lr;
    T momentum;
    T one_minus_dampening;
    T nesterov;
    T first;  // no momentum yet: the buffer becomes the gradient itself, whatever memory it holds

    FUSEDOPT_HD Constants(const Hyper& h, double step)
        : open(h.common),
          lr(T(h.common.lr)),
          momentum(T(h.momentum)),
          one_minus_dampening(T(1.0 - h.dampening)),
          nesterov(T(h.nesterov)),
          first(T(step <= 1.0 ? 1.0 : 0.0)) {}
  };

  template <int kVariant, typename T, int kStates>
  static FUSEDOPT_HD void update(const Constants<T>& c, T& param, T grad, T (&state)[kStates]) {
    c.open(param, grad);
    if constexpr (kVariant & kMomentum) {
      T& momentum_buffer = state[0];
      const T moved = c.momentum * momentum_buffer + c.one_minus_dampening * grad;
      momentum_buffer = c.first != T(0) ? grad : moved;
      grad = c.nesterov != T(0) ? grad + c.momentum * momentum_buffer : momentum_buffer;
    }
    param = param - c.lr * grad;
  }
};

}  // namespace fusedopt::rules
