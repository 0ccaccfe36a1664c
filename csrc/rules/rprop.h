// Rprop (Riedmiller & Braun 1993, IEEE ICNN) as torch.optim.Rprop has it: each element has a step
// size of its own, which grows while the gradient keeps its sign and shrinks, without a step, where
// it changes. There is no weight decay, and the learning rate is only what step sizes start from.
#pragma once

#include "rules/common.h"

namespace fusedopt::rules {

struct rprop {
  static constexpr int kVariants = 1;
  static constexpr std::array<const char*, 6> kHyperNames = {
      "lr", "maximize", "etas.0", "etas.1", "step_sizes.0", "step_sizes.1"};
  static constexpr std::array<const char*, 0> kVariantNames = {};
  static constexpr std::array<StateName, 2> kStateNames = {{{"prev", 0}, {"step_size", 0}}};

  struct Hyper {
    UndecayedHyper common;
    double etaminus;
    double etaplus;
    double step_size_min;
    double step_size_max;
  };

  template <typename T>
  struct Constants {
    Opening<T> open;
    T first;  // no step size yet: it is lr, whatever memory it holds
    T lr;
    T etaminus;
    T etaplus;
    T step_size_min;
    T step_size_max;

    FUSEDOPT_HD Constants(const Hyper& h, double step)
        : open(h.common),
          first(T(step <= 1.0 ? 1.0 : 0.0)),
          lr(T(h.common.lr)),
          etaminus(T(h.etaminus)),
          etaplus(T(h.etaplus)),
          step_size_min(T(h.step_size_min)),
          step_size_max(T(h.step_size_max)) {}
  };

  template <int kVariant, typename T, int kStates>
  static FUSEDOPT_HD void update(const Constants<T>& c, T& param, T grad, T (&state)[kStates]) {
    T& prev = state[0];
    T& step_size = state[1];
    c.open(param, grad);
    const T product = grad * prev;
    const T factor = product > T(0) ? c.etaplus : (product < T(0) ? c.etaminus : T(1));
    step_size = (c.first != T(0) ? c.lr : step_size) * factor;
    step_size = step_size < c.step_size_min ? c.step_size_min : step_size;
    step_size = step_size > c.step_size_max ? c.step_size_max : step_size;
    prev = product < T(0) ? T(0) : grad;
    param = param - sign_of(prev) * step_size;
  }
};

}  // namespace fusedopt::rules
