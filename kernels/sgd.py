"""Stochastic gradient descent with momentum (Polyak 1964): csrc/rules/sgd.h in Triton.

Dampening, and Nesterov's look-ahead in the form of Sutskever et al. 2013 that torch.optim.SGD uses.
"""

import triton
import triton.language as tl
from fusedopt.kernels.common import opening, opening_constants

HYPER = (
    "lr",
    "weight_decay",
    "decoupled_weight_decay",
    "maximize",
    "momentum",
    "dampening",
    "nesterov",
)
VARIANTS = ("momentum",)
STATES = (("momentum_buffer", 1),)


@triton.jit
def constants(hyper, step, T: tl.constexpr):
    """What one parameter's elements share, in double, each rounded once."""
    lr, momentum, dampening, nesterov = hyper[0], hyper[4], hyper[5], hyper[6]
    # On the first applied step there is no momentum: the buffer becomes the gradient, whatever
    # memory it holds.
    first = tl.where(step <= 1.0, 1.0, 0.0).to(T)
    one_minus_dampening = (1.0 - dampening).to(T)
    return (
        opening_constants(hyper, T),
        lr.to(T),
        momentum.to(T),
        one_minus_dampening,
        nesterov.to(T),
        first,
    )


@triton.jit
def update(constants, param, grad, state, VARIANT: tl.constexpr):
    """One step of every element: returns (param, state)."""
    open, lr, momentum, one_minus_dampening, nesterov, first = constants
    param, grad = opening(open, param, grad)
    if VARIANT & 1:
        moved = momentum * state[0] + one_minus_dampening * grad
        momentum_buffer = tl.where(first != 0.0, grad, moved)
        grad = tl.where(nesterov != 0.0, grad + momentum * momentum_buffer, momentum_buffer)
        state = (momentum_buffer,)
    return param - lr * grad, state
