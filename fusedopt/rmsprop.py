"""RMSprop."""

from __future__ import annotations

import torch

from ._optimizer import FusedOptimizer
from .plain.rule import PlainRule


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    r"""RMSprop in one fused pass; a drop-in for :class:`torch.optim.RMSprop`.

    .. math::
        v_t &= \alpha v_{t-1} + (1 - \alpha) g_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma \frac{g_t}{\sqrt{v_t} + \epsilon}

    ``centered`` subtracts the squared moving average of the gradient from :math:`v_t` under the
    root; with momentum the quotient goes through a buffer :math:`b_t = \mu b_{t-1} + g_t /
    (\sqrt{v_t} + \epsilon)` first.

    Args:
        params: Parameters, named parameters, or groups of them. State tensors have a parameter's
            shape and dtype.
        lr (float | Tensor): Learning rate :math:`\gamma`. Default: 1e-2.
        alpha (float): Decay :math:`\alpha` of the moving averages. Default: 0.99.
        eps (float): Added to the root. Default: 1e-8.
        weight_decay (float): L2 penalty, or decoupled decay. Default: 0.
        momentum (float): Momentum :math:`\mu`. Default: 0, no buffer.
        centered (bool): Normalises by an estimate of the variance. Default: False.
        capturable (bool): Allows capture in a CUDA graph. Default: False.
        foreach (bool | None): As in torch, for what torch's rule updates; kernels do without.
            Default: None.
        maximize (bool): Ascends instead of descending. Default: False.
        differentiable (bool): Lets autograd through the step; takes torch's rule. Default: False.
        {extras}

    Example:
        >>> optimizer = fusedopt.RMSprop(model.parameters(), lr=1e-3, momentum=0.9)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Tieleman & Hinton, "Lecture 6.5: RMSProp", Coursera 2012; centered: Graves 2013,
    arXiv:1308.0850.
    """

    _rule = PlainRule(
        "rmsprop",
        torch.optim.RMSprop,
        states=("square_avg", "momentum_buffer", "grad_avg"),
        lerped=("grad_avg",),
    )
