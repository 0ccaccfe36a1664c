"""Lion (Chen et al. 2023, arXiv:2302.06675): csrc/rules/lion.h in Triton.

The step is the sign of one moving average, the state another; weight decay is always decoupled.
"""

import triton
import triton.language as tl
from fusedopt.kernels.common import lerp, lerp_weights, opening, opening_constants, sign_of

HYPER = ("lr", "weight_decay", "decoupled_weight_decay", "maximize", "betas.0", "betas.1")
VARIANTS = ()
STATES = (("exp_avg", 0),)


@triton.jit
def constants(hyper, step, T: tl.constexpr):
    """What one parameter's elements share, in double, each rounded once."""
    lr, weight_decay, maximize, beta1, beta2 = hyper[0], hyper[1], hyper[3], hyper[4], hyper[5]
    open = opening_constants((lr, weight_decay, 1.0, maximize), T)
    return open, lr.to(T), lerp_weights(1.0 - beta1, T), lerp_weights(1.0 - beta2, T)


@triton.jit
def update(constants, param, grad, state, VARIANT: tl.constexpr):
    """One step of every element: returns (param, state)."""
    open, lr, lerp_direction, lerp_avg = constants
    param, grad = opening(open, param, grad)
    direction = lerp(lerp_direction, state[0], grad)
    return param - lr * sign_of(direction), (lerp(lerp_avg, state[0], grad),)
