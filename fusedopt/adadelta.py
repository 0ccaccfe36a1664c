"""Adadelta."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adadelta import adadelta

from ._optimizer import FusedOptimizer


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

    _rule = "adadelta"
    _states = ("square_avg", "acc_delta")
    _captures_on_xla = False

    def _update_with_torch(self, group: dict[str, Any], grads: list[Tensor] | None) -> None:
        lists, has_complex = self._collect(group)
        params, own_grads, square_avgs, acc_deltas, steps = lists
        adadelta(
            params,
            own_grads if grads is None else grads,
            square_avgs,
            acc_deltas,
            steps,
            capturable=group["capturable"],
            foreach=group["foreach"],
            differentiable=group["differentiable"],
            has_complex=has_complex,
            lr=group["lr"],
            rho=group["rho"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )
