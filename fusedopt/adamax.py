"""Adamax."""

from __future__ import annotations

import torch

from ._optimizer import FusedOptimizer
from .plain.rule import PlainRule


class Adamax(FusedOptimizer, torch.optim.Adamax):
    r"""Adamax in one fused pass; a drop-in for :class:`torch.optim.Adamax`.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        u_t &= \max(\beta_2 u_{t-1}, |g_t| + \epsilon) \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t} \frac{m_t}{u_t}

    Args:
        params: Parameters, named parameters, or groups of them. State tensors have a parameter's
            shape and dtype.
        lr (float | Tensor): Learning rate :math:`\gamma`. Default: 2e-3.
        betas (tuple): Decay of the moving average and of the infinity norm. Default: (0.9, 0.999).
        eps (float): Added to the gradient's magnitude. Default: 1e-8.
        weight_decay (float): L2 penalty, or decoupled decay. Default: 0.
        foreach (bool | None): As in torch, for what torch's rule updates; kernels do without.
            Default: None.
        maximize (bool): Ascends instead of descending. Default: False.
        differentiable (bool): Lets autograd through the step; takes torch's rule. Default: False.
        capturable (bool): Allows capture in a CUDA graph. Default: False.
        {extras}

    Example:
        >>> optimizer = fusedopt.Adamax(model.parameters(), lr=2e-3)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, arXiv:1412.6980,
    section 7.1.
    """

    _rule = PlainRule(
        "adamax", torch.optim.Adamax, states=("exp_avg", "exp_inf"), lerped=("exp_avg",)
    )
