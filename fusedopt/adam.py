"""Adam."""

from __future__ import annotations

import torch

from ._optimizer import FusedOptimizer
from .plain.rule import PlainRule


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

    _rule = PlainRule(
        "adam",
        torch.optim.Adam,
        states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        lerped=("exp_avg",),
        fuses_subclasses=True,
    )
