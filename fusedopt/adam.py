"""Adam."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from ._optimizer import FusedOptimizer


class Adam(FusedOptimizer, torch.optim.Adam):
    r"""Adam in one fused pass; a drop-in for :class:`torch.optim.Adam`.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t}
            \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}

    With ``amsgrad`` the root takes the largest :math:`v` so far.

    Args:
        params: Parameters, named parameters, or groups of them. State tensors have a parameter's
            shape and dtype.
        lr (float | Tensor): Learning rate :math:`\gamma`. Default: 1e-3.
        betas (tuple): Decay of the two moving averages. Default: (0.9, 0.999).
        eps (float): Added to the root. Default: 1e-8.
        weight_decay (float): L2 penalty, or decoupled decay. Default: 0.
        amsgrad (bool): Keeps the largest second moment. Default: False.
        foreach (bool | None): As in torch, for what torch's rule updates; kernels do without.
            Default: None.
        maximize (bool): Ascends instead of descending. Default: False.
        capturable (bool): Allows capture in a CUDA graph. Default: False.
        differentiable (bool): Lets autograd through the step; takes torch's rule. Default: False.
        {extras}

    Example:
        >>> optimizer = fusedopt.Adam(model.parameters(), lr=3e-4, max_grad_norm=1.0)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, arXiv:1412.6980;
    Reddi et al., "On the Convergence of Adam and Beyond", ICLR 2018, arXiv:1904.09237.
    """

    _rule = "adam"
    _states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _torch_decouples = True
    _fuses_subclasses = True

    def _lerped(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _update_with_torch(self, group: dict[str, Any], grads: list[Tensor] | None) -> None:
        lists, has_complex = self._collect(group)
        params, own_grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps = lists
        beta1, beta2 = group["betas"]
        adam(
            params,
            own_grads if grads is None else grads,
            exp_avgs,
            exp_avg_sqs,
            max_exp_avg_sqs,
            steps,
            foreach=group["foreach"],
            capturable=group["capturable"],
            differentiable=group["differentiable"],
            fused=self._fuses(group, lists),
            has_complex=has_complex,
            decoupled_weight_decay=group.get("decoupled_weight_decay", False),
            amsgrad=group["amsgrad"],
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
