"""Adam (Kingma & Ba 2015, arXiv:1412.6980): csrc/rules/adam.h in Triton.

Also AMSGrad (Reddi et al. 2018, arXiv:1904.09237) and, with decoupled decay, AdamW (Loshchilov &
Hutter 2019, arXiv:1711.05101).
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
    root,
)

HYPER = ("lr", "weight_decay", "decoupled_weight_decay", "maximize", "betas.0", "betas.1", "eps")
VARIANTS = ("amsgrad",)
STATES = (("exp_avg", 0), ("exp_avg_sq", 0), ("max_exp_avg_sq", 1))


@triton.jit
def constants(hyper, step, T: tl.constexpr):
    """What one parameter's elements share, in double, each rounded once."""
    lr, beta1, beta2, eps = hyper[0], hyper[4], hyper[5], hyper[6]
    lerp_avg = lerp_weights(1.0 - beta1, T)
    one_minus_beta2 = (1.0 - beta2).to(T)
    inv_root_correction = (1.0 / root(1.0 - power(beta2, step))).to(T)
    step_size = (lr / (1.0 - power(beta1, step))).to(T)
    return (
        opening_constants(hyper, T),
        lerp_avg,
        beta2.to(T),
        one_minus_beta2,
        inv_root_correction,
        eps.to(T),
        step_size,
    )


@triton.jit
def update(constants, param, grad, state, VARIANT: tl.constexpr):
    """One step of every element: returns (param, state)."""
    open, lerp_avg, beta2, one_minus_beta2, inv_root_correction, eps, step_size = constants
    param, grad = opening(open, param, grad)
    exp_avg = lerp(lerp_avg, state[0], grad)
    exp_avg_sq = beta2 * state[1] + one_minus_beta2 * grad * grad
    if VARIANT & 1:
        max_exp_avg_sq = maximum(state[2], exp_avg_sq)
        denom = root(max_exp_avg_sq) * inv_root_correction + eps
        state = (exp_avg, exp_avg_sq, max_exp_avg_sq)
    else:
        denom = root(exp_avg_sq) * inv_root_correction + eps
        state = (exp_avg, exp_avg_sq)
    return param - divide(step_size * exp_avg, denom), state
