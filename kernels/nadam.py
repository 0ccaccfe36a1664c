"""NAdam (Dozat 2016, "Incorporating Nesterov Momentum into Adam"): csrc/rules/nadam.h in Triton.

As torch.optim has it, with the decaying momentum of Sutskever et al. 2013 and, decoupled, the decay
of Loshchilov & Hutter 2019 (arXiv:1711.05101).
"""

import triton
import triton.language as tl
from fusedopt.kernels.common import (
    divide,
    kept,
    lerp,
    lerp_weights,
    opening,
    opening_constants,
    power,
    root,
)

HYPER = (
    "lr",
    "weight_decay",
    "decoupled_weight_decay",
    "maximize",
    "betas.0",
    "betas.1",
    "eps",
    "momentum_decay",
)
VARIANTS = ()
STATES = (("exp_avg", 0), ("exp_avg_sq", 0))
SCALARS = ("mu_product",)


@triton.jit
def _momentum(hyper, step):
    """The momentum of a step."""
    beta1, momentum_decay = hyper[4], hyper[7]
    return beta1 * (1.0 - 0.5 * power(tl.full((), 0.96, tl.float64), step * momentum_decay))


@triton.jit
def _multiplied(mu_product, momentum):
    """mu_product * momentum, in the type of mu_product."""
    return kept(mu_product, mu_product[0] * kept(mu_product, momentum))


@triton.jit
def advance(hyper, step, scalars):
    """What a step makes of the scalars."""
    return (_multiplied(scalars[0], _momentum(hyper, step)),)


@triton.jit
def constants(hyper, step, scalars, T: tl.constexpr):
    """What one parameter's elements share, in double, each rounded once."""
    lr, beta1, beta2, eps = hyper[0], hyper[4], hyper[5], hyper[6]
    mu = _momentum(hyper, step)
    mu_next = _momentum(hyper, step + 1.0)
    mu_product = _multiplied(scalars[0], mu)
    return (
        opening_constants(hyper, T),
        lerp_weights(1.0 - beta1, T),
        beta2.to(T),
        (1.0 - beta2).to(T),
        (1.0 / root(1.0 - power(beta2, step))).to(T),
        eps.to(T),
        (lr * (1.0 - mu) / (1.0 - mu_product)).to(T),
        (lr * mu_next / (1.0 - mu_product * mu_next)).to(T),
    )


@triton.jit
def update(constants, param, grad, state, VARIANT: tl.constexpr):
    """One step of every element: returns (param, state)."""
    open, lerp_avg, beta2, one_minus_beta2, inv_root_correction, eps, grad_size, avg_size = (
        constants
    )
    param, grad = opening(open, param, grad)
    exp_avg = lerp(lerp_avg, state[0], grad)
    exp_avg_sq = beta2 * state[1] + one_minus_beta2 * grad * grad
    denom = root(exp_avg_sq) * inv_root_correction + eps
    return param - divide(grad_size * grad + avg_size * exp_avg, denom), (exp_avg, exp_avg_sq)
