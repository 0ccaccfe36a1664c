"""RAdam (Liu et al. 2020, arXiv:1908.03265): csrc/rules/radam.h in Triton.

Adam whose step has no denominator while the second moment rests on too few gradients. As in
torch.optim.RAdam eps is added to the plain root, before the bias correction.
"""

import triton
import triton.language as tl
from fusedopt.kernels.common import (
    divide,
    lerp,
    lerp_weights,
    opening,
    opening_constants,
    power,
    precise_power,
    root,
)

HYPER = ("lr", "weight_decay", "decoupled_weight_decay", "maximize", "betas.0", "betas.1", "eps")
VARIANTS = ()
STATES = (("exp_avg", 0), ("exp_avg_sq", 0))


@triton.jit
def rectification(beta2, step):
    """What an average of `step` gradients says of their variance: nothing up to a length of 5.

    Returns (length, factor): rho_t, and r_t sqrt(1 - beta2^t) or 1 where the denominator is left
    out.
    """
    decayed = precise_power(beta2, step)
    correction = 1.0 - decayed
    longest = 2.0 / (1.0 - beta2) - 1.0
    length = longest - 2.0 * step * decayed / correction
    variance = (
        (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
    )
    return length, tl.where(length > 5.0, root(variance) * root(correction), 1.0)


@triton.jit
def constants(hyper, step, T: tl.constexpr):
    """What one parameter's elements share, in double, each rounded once."""
    lr, beta1, beta2, eps = hyper[0], hyper[4], hyper[5], hyper[6]
    lerp_avg = lerp_weights(1.0 - beta1, T)
    one_minus_beta2 = (1.0 - beta2).to(T)
    length, factor = rectification(beta2, step)
    rectified = tl.where(length > 5.0, 1.0, 0.0).to(T)
    step_size = (lr / (1.0 - power(beta1, step)) * factor).to(T)
    open = opening_constants(hyper, T)
    return open, lerp_avg, beta2.to(T), one_minus_beta2, eps.to(T), rectified, step_size


@triton.jit
def update(constants, param, grad, state, VARIANT: tl.constexpr):
    """One step of every element: returns (param, state)."""
    open, lerp_avg, beta2, one_minus_beta2, eps, rectified, step_size = constants
    param, grad = opening(open, param, grad)
    exp_avg = lerp(lerp_avg, state[0], grad)
    exp_avg_sq = beta2 * state[1] + one_minus_beta2 * grad * grad
    denom = tl.where(rectified != 0.0, root(exp_avg_sq) + eps, 1.0)
    return param - divide(step_size * exp_avg, denom), (exp_avg, exp_avg_sq)
