"""Rprop (Riedmiller & Braun 1993, IEEE ICNN): csrc/rules/rprop.h in Triton.

As torch.optim.Rprop has it: each element has a step size of its own, which grows while the gradient
keeps its sign and shrinks, without a step, where it changes. There is no weight decay, and the
learning rate is only what step sizes start from.
"""

import triton
import triton.language as tl
from fusedopt.kernels.common import opening, opening_constants, sign_of

HYPER = ("lr", "maximize", "etas.0", "etas.1", "step_sizes.0", "step_sizes.1")
VARIANTS = ()
STATES = (("prev", 0), ("step_size", 0))


@triton.jit
def constants(hyper, step, T: tl.constexpr):
    """What one parameter's elements share, in double, each rounded once."""
    lr, maximize, etaminus, etaplus, step_size_min, step_size_max = hyper
    open = opening_constants((lr, 0.0, 0.0, maximize), T)
    # No step size yet: it is lr, whatever memory it holds.
    first = tl.where(step <= 1.0, 1.0, 0.0).to(T)
    limits = step_size_min.to(T), step_size_max.to(T)
    return open, first, lr.to(T), etaminus.to(T), etaplus.to(T), limits


@triton.jit
def update(constants, param, grad, state, VARIANT: tl.constexpr):
    """One step of every element: returns (param, state)."""
    open, first, lr, etaminus, etaplus, limits = constants
    step_size_min, step_size_max = limits
    param, grad = opening(open, param, grad)
    product = grad * state[0]
    step_size = tl.where(first != 0.0, lr, state[1])
    step_size = step_size * tl.where(product > 0.0, etaplus, tl.where(product < 0.0, etaminus, 1.0))
    step_size = tl.where(step_size < step_size_min, step_size_min, step_size)
    step_size = tl.where(step_size > step_size_max, step_size_max, step_size)
    prev = tl.where(product < 0.0, 0.0, grad)
    return param - sign_of(prev) * step_size, (prev, step_size)
