"""Adamax (Kingma & Ba 2015, arXiv:1412.6980, section 7.1): csrc/rules/adamax.h in Triton.

Adam with the infinity norm; eps is added to the gradient's magnitude, as torch.optim.Adamax has it.
"""

import triton
import triton.language as tl
from fusedopt.kernels.common import (
    divide,
    lerp,
    lerp_weights,
    maximum,
    opening,
    opening_constants,
    power,
)

HYPER = ("lr", "weight_decay", "decoupled_weight_decay", "maximize", "betas.0", "betas.1", "eps")
VARIANTS = ()
STATES = (("exp_avg", 0), ("exp_inf", 0))


@triton.jit
def constants(hyper, step, T: tl.constexpr):
    """What one parameter's elements share, in double, each rounded once."""
    lr, beta1, beta2, eps = hyper[0], hyper[4], hyper[5], hyper[6]
    step_size = (lr / (1.0 - power(beta1, step))).to(T)
    lerp_avg = lerp_weights(1.0 - beta1, T)
    return opening_constants(hyper, T), lerp_avg, beta2.to(T), eps.to(T), step_size


@triton.jit
def update(constants, param, grad, state, VARIANT: tl.constexpr):
    """One step of every element: returns (param, state)."""
    open, lerp_avg, beta2, eps, step_size = constants
    param, grad = opening(open, param, grad)
    exp_avg = lerp(lerp_avg, state[0], grad)
    magnitude = tl.where(grad < 0.0, -grad, grad)
    exp_inf = maximum(beta2 * state[1], magnitude + eps)
    return param - divide(step_size * exp_avg, exp_inf), (exp_avg, exp_inf)
