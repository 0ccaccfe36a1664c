"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch

from ._optimizer import FusedOptimizer
from .plain.rule import PlainRule, Training


class _AdagradRule(PlainRule):
    def prepare(self, group: dict[str, Any], training: Training) -> dict[str, Any]:
        # torch 2.11 makes state in the constructor only, and refuses `fused` on GPUs here.
        fused = group["fused"]
        initial = training.defaults["initial_accumulator_value"]
        for param in group["params"]:
            if param.grad is not None and not training.state[param]:
                new = torch.optim.Adagrad([param], initial_accumulator_value=initial, fused=fused)
                training.state[param] = new.state[param]
        return {**group, "fused": False}


class Adagrad(FusedOptimizer, torch.optim.Adagrad):
    r"""Adagrad in one fused pass; a drop-in for :class:`torch.optim.Adagrad`.

    .. math::
        s_t &= s_{t-1} + g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 + (t - 1) \eta} \frac{g_t}{\sqrt{s_t} + \epsilon}

    Args:
        params: Parameters, named parameters, or groups of them. ``sum`` has a parameter's shape and
            dtype and is made here, as torch makes it.
        lr (float | Tensor): Learning rate :math:`\gamma`. Default: 1e-2.
        lr_decay (float): Decay :math:`\eta` of the learning rate. Default: 0.
        weight_decay (float): L2 penalty, or decoupled decay. Default: 0.
        initial_accumulator_value (float): What ``sum`` starts from. Default: 0.
        eps (float): Added to the root. Default: 1e-10.
        foreach (bool | None): As in torch, for what torch's rule updates; kernels do without.
            Default: None.
        maximize (bool): Ascends instead of descending. Default: False.
        differentiable (bool): Lets autograd through the step; takes torch's rule. Default: False.
        {extras}

    Example:
        >>> optimizer = fusedopt.Adagrad(model.parameters(), lr=1e-2)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Duchi, Hazan & Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", JMLR 2011.
    """

    _rule = _AdagradRule("adagrad", torch.optim.Adagrad, states=("sum",))
