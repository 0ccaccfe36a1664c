"""The base of algorithms that torch lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import _use_grad_for_differentiable


class PlainOptimizer(torch.optim.Optimizer):
    """An algorithm in torch operations, one parameter after the other, in torch's shape.

    A subclass names its states and writes `_update`; its constructor checks the hyperparameters
    that are its own and hands all of them to this one.

    Args:
        params: As in torch.
        lr: Learning rate, a number or a tensor of one element.
        weight_decay: Decay; how it is applied is the algorithm's.
        maximize: Whether to ascend.
        differentiable: Whether autograd sees the step.
        **hyper: The algorithm's own hyperparameters.

    Raises:
        ValueError: For a negative ``lr`` or ``weight_decay``, in torch's words.
    """

    #: Names in ``optimizer.state[parameter]``: tensors like the parameter that start from zeros.
    _STATES: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        weight_decay: float,
        maximize: bool,
        differentiable: bool,
        **hyper: Any,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        flags = {"maximize": maximize, "differentiable": differentiable}
        super().__init__(params, {"lr": lr, **hyper, "weight_decay": weight_decay, **flags})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("differentiable", False)

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: Re-evaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            states: list[list[Tensor]] = []
            self._init_group(group, params, grads, states)
            for param, grad, state in zip(params, grads, states, strict=True):
                tensors = [param, -grad if group["maximize"] else grad, *state]
                if param.is_complex():
                    tensors = list(map(torch.view_as_real, tensors))
                self._update(group, *tensors)
        return loss

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
    ) -> None:
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            state = self.state[param]
            if not state:
                for name in self._STATES:
                    state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
            params.append(param)
            grads.append(param.grad)
            states.append([state[name] for name in self._STATES])

    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor, *states: Tensor) -> None:
        """Updates a parameter and its states in place.

        Args:
            group: Where the hyperparameters are; ``maximize`` has been seen to.
            param: A real tensor, as all others.
            grad: Its gradient, not to be written.
            *states: In the order of `_STATES`.
        """
        raise NotImplementedError
