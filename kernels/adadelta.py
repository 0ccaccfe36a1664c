"""Adadelta (Zeiler 2012, arXiv:1212.5701): csrc/rules/adadelta.h in Triton.

eps stands inside both roots; acc_delta is updated after the step is computed.
"""

import triton
import triton.language as tl
from fusedopt.kernels.common import divide, opening, opening_constants, root

HYPER = ("lr", "weight_decay", "decoupled_weight_decay", "maximize", "rho", "eps")
VARIANTS = ()
STATES = (("square_avg", 0), ("acc_delta", 0))


@triton.jit
def constants(hyper, step, T: tl.constexpr):
    """What one parameter's elements share, in double, each rounded once."""
    lr, rho, eps = hyper[0], hyper[4], hyper[5]
    return opening_constants(hyper, T), lr.to(T), rho.to(T), (1.0 - rho).to(T), eps.to(T)


@triton.jit
def update(constants, param, grad, state, VARIANT: tl.constexpr):
    """One step of every element: returns (param, state)."""
    open, lr, rho, one_minus_rho, eps = constants
    param, grad = opening(open, param, grad)
    square_avg = rho * state[0] + one_minus_rho * grad * grad
    delta = divide(root(state[1] + eps), root(square_avg + eps)) * grad
    acc_delta = rho * state[1] + one_minus_rho * delta * delta
    return param - lr * delta, (square_avg, acc_delta)
