"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from ._optimizer import FusedOptimizer


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

    _rule = "sgd"
    _has_step = False
    _states = ("momentum_buffer",)
    _views_as_real = False

    def _create_state(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            buffer = torch.zeros_like(param, memory_format=torch.preserve_format)
            self.state[param]["momentum_buffer"] = buffer
            self._pipeline.counters.add_unset_buffer(buffer)

    def _update_with_torch(self, group: dict[str, Any], grads: list[Tensor] | None) -> None:
        unset = set(self._pipeline.counters.unset_buffers(self.state))
        for param in unset.intersection(group["params"]):
            del self.state[param]["momentum_buffer"]
        lists, has_sparse_grad = self._collect(group)
        params, own_grads, momentum_buffers = lists
        sgd(
            params,
            own_grads if grads is None else grads,
            momentum_buffers,
            has_sparse_grad=has_sparse_grad,
            foreach=group["foreach"],
            fused=self._fuses(group, lists),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"] != 0:
            for param, buffer in zip(params, momentum_buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer
