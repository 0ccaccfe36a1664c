"""Lion."""

from __future__ import annotations

from ._optimizer import FusedOptimizer
from .plain import lion as plain
from .plain.rule import PlainRule


class Lion(FusedOptimizer, plain.Lion):
    r"""Lion in one fused pass; in the shape of torch's classes, which lack it.

    .. math::
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1}
            - \gamma \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t) \\
        m_t &= \beta_2 m_{t-1} + (1 - \beta_2) g_t

    It keeps one state, so a step moves five tensors where Adam's moves seven.

    Args:
        params: Parameters, named parameters, or groups of them. ``exp_avg`` has a parameter's shape
            and dtype.
        lr (float | Tensor): Learning rate :math:`\gamma`, a third to a tenth of Adam's. Default:
            1e-4.
        betas (tuple): Weights of the average in the direction and of the average itself. Default:
            (0.9, 0.99).
        weight_decay (float): Decay :math:`\lambda`, always decoupled; three to ten times Adam's.
            Default: 0.
        maximize (bool): Ascends instead of descending. Default: False.
        differentiable (bool): Lets autograd through the step; takes the plain rule. Default: False.
        {extras}

    Example:
        >>> optimizer = fusedopt.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
        >>> loss.backward()
        >>> optimizer.step()

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023,
    arXiv:2302.06675. Names of arguments and state as in bitsandbytes, timm and the authors' code.
    """

    _rule = PlainRule(
        "lion",
        plain.Lion,
        states=("exp_avg",),
        has_step=False,
        lerped=("exp_avg",),
        always_decouples=True,
    )
