"""RAdam."""

from __future__ import annotations

import torch

from ._optimizer import FusedOptimizer
from .plain.rule import PlainRule


class RAdam(FusedOptimizer, torch.optim.RAdam):
    r"""RAdam in one fused pass; a drop-in for :class:`torch.optim.RAdam`.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \rho_\infty &= \frac{2}{1 - \beta_2} - 1, \qquad
            \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t} \\
        r_t &= \sqrt{\frac{(\rho_t - 4) (\rho_t - 2) \rho_\infty}
            {(\rho_\infty - 4) (\rho_\infty - 2) \rho_t}} \\
        \theta_t &= \theta_{t-1} - \frac{\gamma}{1 - \beta_1^t} m_t \cdot \begin{cases}
            r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\
            1 & \text{otherwise} \end{cases}

    Args:
        params: Parameters, named parameters, or groups of them. State tensors have a parameter's
            shape and dtype.
        lr (float | Tensor): Learning rate :math:`\gamma`. Default: 1e-3.
        betas (tuple): Decay of the two moving averages. Default: (0.9, 0.999).
        eps (float): Added to the root. Default: 1e-8.
        weight_decay (float): L2 penalty, or decoupled decay. Default: 0.
        decoupled_weight_decay (bool): Shrinks the parameter by ``1 - lr * weight_decay`` instead of
            adding ``weight_decay * parameter`` to the gradient. Default: False.
        foreach (bool | None): As in torch, for what torch's rule updates; kernels do without.
            Default: None.
        maximize (bool): Ascends instead of descending. Default: False.
        capturable (bool): Allows capture in a CUDA graph. Default: False.
        differentiable (bool): Lets autograd through the step; takes torch's rule. Default: False.
        {extras}

    Example:
        >>> optimizer = fusedopt.RAdam(model.parameters(), lr=1e-3)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020,
    arXiv:1908.03265.
    """

    _rule = PlainRule(
        "radam", torch.optim.RAdam, states=("exp_avg", "exp_avg_sq"), lerped=("exp_avg",)
    )
