"""Adadelta."""

from __future__ import annotations

import torch

from ._optimizer import FusedOptimizer
from .plain.rule import PlainRule


class Adadelta(FusedOptimizer, torch.optim.Adadelta):
    r"""Adadelta in one fused pass; a drop-in for :class:`torch.optim.Adadelta`.

    .. math::
        v_t &= \rho v_{t-1} + (1 - \rho) g_t^2 \\
        \Delta_t &= \frac{\sqrt{u_{t-1} + \epsilon}}{\sqrt{v_t + \epsilon}} g_t \\
        u_t &= \rho u_{t-1} + (1 - \rho) \Delta_t^2 \\
        \theta_t &= \theta_{t-1} - \gamma \Delta_t

    Args:
        params: Parameters, named parameters, or groups of them. State tensors have a parameter's
            shape and dtype.
        lr (float | Tensor): Factor :math:`\gamma` of the step. Default: 1.0.
        rho (float): Decay :math:`\rho` of the moving averages. Default: 0.9.
        eps (float): Added under both roots. Default: 1e-6.
        weight_decay (float): L2 penalty, or decoupled decay. Default: 0.
        foreach (bool | None): As in torch, for what torch's rule updates; kernels do without.
            Default: None.
        capturable (bool): Allows capture in a CUDA graph. Default: False.
        maximize (bool): Ascends instead of descending. Default: False.
        differentiable (bool): Lets autograd through the step; takes torch's rule. Default: False.
        {extras}

    Example:
        >>> optimizer = fusedopt.Adadelta(model.parameters())
        >>> loss.backward()
        >>> optimizer.step()

    Source: Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, arXiv:1212.5701.
    """

    _rule = PlainRule(
        "adadelta",
        torch.optim.Adadelta,
        states=("square_avg", "acc_delta"),
        captures_on_xla=False,
    )
