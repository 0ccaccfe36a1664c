"""NAdam."""

from __future__ import annotations

import torch

from ._optimizer import FusedOptimizer
from .plain.rule import PlainRule


class NAdam(FusedOptimizer, torch.optim.NAdam):
    r"""NAdam in one fused pass; a drop-in for :class:`torch.optim.NAdam`.

    .. math::
        \mu_t &= \beta_1 (1 - 0.5 \cdot 0.96^{t \psi}) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon}
            \left( \frac{(1 - \mu_t) g_t}{1 - \prod_{i=1}^{t} \mu_i}
            + \frac{\mu_{t+1} m_t}{1 - \prod_{i=1}^{t+1} \mu_i} \right)

    Args:
        params: Parameters, named parameters, or groups of them. ``exp_avg`` and ``exp_avg_sq`` have
            a parameter's shape and dtype; ``mu_product`` is a number, like ``step``.
        lr (float | Tensor): Learning rate :math:`\gamma`. Default: 2e-3.
        betas (tuple): Decay of the two moving averages. Default: (0.9, 0.999).
        eps (float): Added to the root. Default: 1e-8.
        weight_decay (float): L2 penalty, or decoupled decay. Default: 0.
        momentum_decay (float): How fast the momentum grows, :math:`\psi`. Default: 4e-3.
        foreach (bool | None): As in torch, for what torch's rule updates; kernels do without.
            Default: None.
        maximize (bool): Ascends instead of descending. Default: False.
        capturable (bool): Allows capture in a CUDA graph. Default: False.
        differentiable (bool): Lets autograd through the step; takes torch's rule. Default: False.
        {extras}

    Example:
        >>> optimizer = fusedopt.NAdam(model.parameters(), lr=2e-3, decoupled_weight_decay=True)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Dozat, "Incorporating Nesterov Momentum into Adam", ICLR 2016 workshop.
    """

    _rule = PlainRule(
        "nadam",
        torch.optim.NAdam,
        states=("exp_avg", "exp_avg_sq"),
        scalars=("mu_product",),
        lerped=("exp_avg",),
        captured="params, mu_products and state_steps",
    )
