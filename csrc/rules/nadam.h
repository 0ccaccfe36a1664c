// NAdam (Dozat 2016, "Incorporating Nesterov Momentum into Adam", ICLR workshop) as torch.optim has
// it, with the decaying momentum of Sutskever et al. 2013 and, decoupled, the decay of Loshchilov &
// Hutter 2019 (arXiv:1711.05101).
#pragma once

#include "rules/common.h"

namespace fusedopt::rules {

struct nadam {
  static constexpr int kVariants = 1;
  static constexpr std::array<const char*, 8> kHyperNames = {
      "lr",      "weight_decay", "decoupled_weight_decay", "maximize", "betas.0",
      "betas.1", "eps",          "momentum_decay"};
  static constexpr std::array<const char*, 0> kVariantNames = {};
  static constexpr std::array<StateName, 2> kStateNames = {{{"exp_avg", 0}, {"exp_avg_sq", 0}}};
  static constexpr std::array<const char*, 1> kScalarNames = {"mu_product"};

  struct Hyper {
    CommonHyper common;
    double beta1;
    double beta2;
    double eps;
    double momentum_decay;
  };

  // The momentum of a step.
  static FUSEDOPT_HD double momentum(const Hyper& h, double step) {
    return h.beta1 * (1.0 - 0.5 * power(0.96, step * h.momentum_decay));
  }

  // mu_product <- mu_product * momentum, in the type of mu_product.
  static FUSEDOPT_HD void multiply(Scalar& mu_product, double momentum) {
    mu_product.value = mu_product.kept(mu_product.value * mu_product.kept(momentum));
  }

  static FUSEDOPT_HD void advance(const Hyper& h, double step, Scalars<1>& scalars) {
    multiply(scalars[0], momentum(h, step));
  }

  template <typename T>
  struct Constants {
    Opening<T> open;
    Lerp<T> lerp_avg;  // 1 - beta1
    T beta2;
    T one_minus_beta2;
    T inv_root_correction;  // 1 / sqrt(1 - beta2^t)
    T eps;
    T grad_size;  // lr (1 - momentum) / (1 - product of the momenta)
    T avg_size;   // lr next momentum / (1 - product of the momenta and the next)

    FUSEDOPT_HD Constants(const Hyper& h, double step, const Scalars<1>& scalars)
        : open(h.common),
          lerp_avg(1.0 - h.beta1),
          beta2(T(h.beta2)),
          one_minus_beta2(T(1.0 - h.beta2)),
          inv_root_correction(T(1.0 / root(1.0 - power(h.beta2, step)))),
          eps(T(h.eps)) {
      const double mu = momentum(h, step);
      const double mu_next = momentum(h, step + 1.0);
      Scalar mu_product = scalars[0];
      multiply(mu_product, mu);
      grad_size = T(h.common.lr * (1.0 - mu) / (1.0 - mu_product.value));
      avg_size = T(h.common.lr * mu_next / (1.0 - mu_product.value * mu_next));
    }
  };

  template <int kVariant, typename T, int kStates>
  static FUSEDOPT_HD void update(const Constants<T>& c, T& param, T grad, T (&state)[kStates]) {
    T& exp_avg = state[0];
    T& exp_avg_sq = state[1];
    c.open(param, grad);
    exp_avg = c.lerp_avg(exp_avg, grad);
    exp_avg_sq = c.beta2 * exp_avg_sq + c.one_minus_beta2 * grad * grad;
    const T denom = root(exp_avg_sq) * c.inv_root_correction + c.eps;
    param = param - (c.grad_size * grad + c.avg_size * exp_avg) / denom;
  }
};

}  // namespace fusedopt::rules
