"""Rprop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ._optimizer import FusedOptimizer
from .plain.rule import PlainRule, Training


class _RpropRule(PlainRule):
    def prepare(self, group: dict[str, Any], training: Training) -> dict[str, Any]:
        # torch makes step_size like the first gradient, whose type may be another.
        for param in group["params"]:
            if param.grad is not None and not training.state[param]:
                like = param.detach()
                like.grad = param.detach()
                maker: Any = SimpleNamespace(state={like: training.state[param]})
                one = {**group, "params": [like]}
                init_group: Any = torch.optim.Rprop._init_group
                init_group(maker, one, *([] for _ in range(5)))
        return group


class Rprop(FusedOptimizer, torch.optim.Rprop):
    r"""Rprop in one fused pass; a drop-in for :class:`torch.optim.Rprop`.

    .. math::
        \eta_t &= \operatorname{clamp}(\eta_{t-1} \cdot \begin{cases}
            \eta_+ & g_{t-1} g_t > 0 \\
            \eta_- & g_{t-1} g_t < 0 \\
            1 & \text{otherwise} \end{cases}, \Gamma_{min}, \Gamma_{max}) \\
        g_t &\leftarrow 0 \quad \text{where } g_{t-1} g_t < 0 \\
        \theta_t &= \theta_{t-1} - \eta_t \operatorname{sign}(g_t)

    It is for gradients of the whole data set: the sign of a small sample's changes too often. It
    has no weight decay, and refuses ``weight_decay`` and ``decoupled_weight_decay``.

    Args:
        params: Parameters, named parameters, or groups of them. State tensors have a parameter's
            shape and dtype.
        lr (float | Tensor): What every element's step size :math:`\eta` starts from, in its first
            step; of no effect later. Default: 1e-2.
        etas (tuple): Factors :math:`(\eta_-, \eta_+)` of the step sizes. Default: (0.5, 1.2).
        step_sizes (tuple): Limits :math:`(\Gamma_{min}, \Gamma_{max})` of the step sizes. Default:
            (1e-6, 50).
        capturable (bool): Allows capture in a CUDA graph. Default: False.
        foreach (bool | None): As in torch, for what torch's rule updates; kernels do without.
            Default: None.
        maximize (bool): Ascends instead of descending. Default: False.
        differentiable (bool): Lets autograd through the step; takes torch's rule. Default: False.
        {extras}

    Example:
        >>> optimizer = fusedopt.Rprop(model.parameters())
        >>> loss.backward()
        >>> optimizer.step()

    Source: Riedmiller & Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The
    RPROP Algorithm", IEEE International Conference on Neural Networks 1993.
    """

    _rule = _RpropRule("rprop", torch.optim.Rprop, states=("prev", "step_size"))
