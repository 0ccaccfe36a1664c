"""Stochastic gradient descent."""

from __future__ import annotations

import torch

from ._optimizer import FusedOptimizer
from .plain.rule import PlainRule


class SGD(FusedOptimizer, torch.optim.SGD):
    r"""SGD in one fused pass; a drop-in for :class:`torch.optim.SGD`.

    .. math::
        b_t &= \mu b_{t-1} + (1 - \tau) g_t, \quad b_1 = g_1 \\
        \theta_t &= \theta_{t-1} - \gamma b_t
            \quad \text{or, with Nesterov's look-ahead,} \quad
            \theta_{t-1} - \gamma (g_t + \mu b_t)

    Args:
        params: Parameters, named parameters, or groups of them. The momentum buffer has a
            parameter's shape and dtype.
        lr (float | Tensor): Learning rate :math:`\gamma`. Default: 1e-3.
        momentum (float): Momentum :math:`\mu`. Default: 0, no buffer.
        dampening (float): Dampening :math:`\tau`; the first gradient is not dampened. Default: 0.
        weight_decay (float): L2 penalty, or decoupled decay. Default: 0.
        nesterov (bool): Nesterov's form; needs momentum and no dampening. Default: False.
        maximize (bool): Ascends instead of descending. Default: False.
        foreach (bool | None): As in torch, for what torch's rule updates; kernels do without.
            Default: None.
        differentiable (bool): Lets autograd through the step; takes torch's rule. Default: False.
        {extras}

    Example:
        >>> optimizer = fusedopt.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning",
    ICML 2013.
    """

    _rule = PlainRule(
        "sgd",
        torch.optim.SGD,
        states=("momentum_buffer",),
        has_step=False,
        starts_unset="momentum_buffer",
        views_as_real=False,
    )
