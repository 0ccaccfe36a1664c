"""Adagrad (Duchi, Hazan & Singer 2011, JMLR 12): csrc/rules/adagrad.h in Triton.

The learning rate decays as in torch.optim.Adagrad: lr / (1 + (t - 1) lr_decay).
"""

import triton
import triton.language as tl
from fusedopt.kernels.common import divide, opening, opening_constants, root

HYPER = ("lr", "weight_decay", "decoupled_weight_decay", "maximize", "lr_decay", "eps")
VARIANTS = ()
STATES = (("sum", 0),)


@triton.jit
def constants(hyper, step, T: tl.constexpr):
    """What one parameter's elements share, in double, each rounded once."""
    lr, lr_decay, eps = hyper[0], hyper[4], hyper[5]
    decayed_lr = (lr / (1.0 + (step - 1.0) * lr_decay)).to(T)
    return opening_constants(hyper, T), decayed_lr, eps.to(T)


@triton.jit
def update(constants, param, grad, state, VARIANT: tl.constexpr):
    """One step of every element: returns (param, state)."""
    open, decayed_lr, eps = constants
    param, grad = opening(open, param, grad)
    sum = state[0] + grad * grad
    return param - divide(decayed_lr * grad, root(sum) + eps), (sum,)
