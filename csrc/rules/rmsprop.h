// RMSprop (Tieleman & Hinton 2012, lecture 6.5), centered after Graves 2013 (arXiv:1308.0850), with
// momentum as in torch.optim.RMSprop: eps stands outside the root.
#pragma once

#include "rules/common.h"

namespace fusedopt::rules {

struct rmsprop {
  static constexpr int kCentered = 1;
  static constexpr int kMomentum = 2;
  static constexpr int kVariants = 4;
  static constexpr std::array<const char*, 7> kHyperNames = {
      "lr", "weight_decay", "decoupled_weight_decay", "maximize", "alpha", "eps", "momentum"};
  static constexpr std::array<const char*, 2> kVariantNames = {"centered", "momentum"};
  static constexpr std::array<StateName, 3> kStateNames = {
      {{"square_avg", 0}, {"grad_avg", kCentered}, {"momentum_buffer", kMomentum}}};

  struct Hyper {
    CommonHyper common;
    double alpha;
    double eps;
    double momentum;
  };

  template <typename T>
  struct Constants {
    Opening<T> open;
    T alpha;
    T one_minus_alpha;
    Lerp<T> lerp_avg;  // 1 - alpha
    T eps;
    T momentum;
    T lr;

    FUSEDOPT_HD Constants(const Hyper& h, double /*step*/)
        : open(h.common),
          alpha(T(h.alpha)),
          one_minus_alpha(T(1.0 - h.alpha)),
          lerp_avg(1.0 - h.alpha),
          eps(T(h.eps)),
          momentum(T(h.momentum)),
          lr(T(h.common.lr)) {}
  };

  template <int kVariant, typename T, int kStates>
  static FUSEDOPT_HD void update(const Constants<T>& c, T& param, T grad, T (&state)[kStates]) {
    T& square_avg = state[0];
    c.open(param, grad);
    square_avg = c.alpha * square_avg + c.one_minus_alpha * grad * grad;
    T variance = square_avg;
    if constexpr (kVariant & kCentered) {
      T& grad_avg = state[1];
      grad_avg = c.lerp_avg(grad_avg, grad);
      variance = square_avg - grad_avg * grad_avg;
    }
    const T denom = root(variance) + c.eps;
    if constexpr (kVariant & kMomentum) {
      T& momentum_buffer = state[kStates - 1];
      momentum_buffer = c.momentum * momentum_buffer + grad / denom;
      param = param - c.lr * momentum_buffer;
    } else {
      param = param - c.lr * grad / denom;
    }
  }
};

}  // namespace fusedopt::rules
