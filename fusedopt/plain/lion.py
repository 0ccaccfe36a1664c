"""Lion (Chen et al. 2023, arXiv:2302.06675) in plain torch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .optimizer import PlainOptimizer


class Lion(PlainOptimizer):
    """See `fusedopt.Lion`, which adds kernels and the gradient pipeline."""

    _STATES = ("exp_avg",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            maximize=maximize,
            differentiable=differentiable,
        )

    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor, *states: Tensor) -> None:
        (exp_avg,) = states
        beta1, beta2 = group["betas"]
        direction = torch.lerp(exp_avg, grad, 1 - beta1).sign()
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(direction * -group["lr"])
        exp_avg.lerp_(grad, 1 - beta2)
