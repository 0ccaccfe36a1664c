"""RMSprop (Tieleman & Hinton 2012, lecture 6.5): csrc/rules/rmsprop.h in Triton.

Centered after Graves 2013 (arXiv:1308.0850), with momentum as in torch.optim.RMSprop: eps stands
outside the root.
"""

import triton
import triton.language as tl
from fusedopt.kernels.common import divide, lerp, lerp_weights, opening, opening_constants, root

HYPER = ("lr", "weight_decay", "decoupled_weight_decay", "maximize", "alpha", "eps", "momentum")
VARIANTS = ("centered", "momentum")
STATES = (("square_avg", 0), ("grad_avg", 1), ("momentum_buffer", 2))


@triton.jit
def constants(hyper, step, T: tl.constexpr):
    """What one parameter's elements share, in double, each rounded once."""
    lr, alpha, eps, momentum = hyper[0], hyper[4], hyper[5], hyper[6]
    one_minus_alpha = 1.0 - alpha
    lerp_avg = lerp_weights(one_minus_alpha, T)
    return (
        opening_constants(hyper, T),
        alpha.to(T),
        one_minus_alpha.to(T),
        lerp_avg,
        eps.to(T),
        momentum.to(T),
        lr.to(T),
    )


@triton.jit
def update(constants, param, grad, state, VARIANT: tl.constexpr):
    """One step of every element: returns (param, state)."""
    open, alpha, one_minus_alpha, lerp_avg, eps, momentum, lr = constants
    param, grad = opening(open, param, grad)
    square_avg = alpha * state[0] + one_minus_alpha * grad * grad
    new_state = (square_avg,)
    if VARIANT & 1:
        grad_avg = lerp(lerp_avg, state[1], grad)
        denom = root(square_avg - grad_avg * grad_avg) + eps
        new_state = new_state + (grad_avg,)
    else:
        denom = root(square_avg) + eps
    if VARIANT & 2:
        momentum_buffer = momentum * state[len(state) - 1] + divide(grad, denom)
        param = param - lr * momentum_buffer
        new_state = new_state + (momentum_buffer,)
    else:
        param = param - divide(lr * grad, denom)
    return param, new_state
