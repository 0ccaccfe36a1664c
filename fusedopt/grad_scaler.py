"""A gradient scaler whose inf check costs no pass of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from ._optimizer import FusedOptimizer


class GradScaler(torch.amp.GradScaler):
    r"""A :class:`torch.amp.GradScaler` that looks for inf and nan inside the optimizer's step.

    With torch's scaler every step reads (and writes) all gradients once more to look for inf and
    nan. With this one, ``scaler.step(optimizer)`` of a fusedopt optimizer unscales, checks and
    updates in the optimizer's own passes; scale, growth and backoff are torch's to the bit, and
    ``state_dict`` interchanges. After ``scaler.unscale_(optimizer)``, and with any other optimizer,
    it behaves as torch's.

    Step pre-hooks and a subclass's own ``step`` see the gradients as they are then, scaled, and run
    in a step that is skipped as well; ``unscale_`` beforehand gives them what torch's would see.

    Args:
        device (str): Device type of the parameters. Default: "cuda".
        init_scale (float): Initial factor of the loss. Default: 65536.
        growth_factor (float): Factor after ``growth_interval`` steps without inf or nan. Default:
            2.
        backoff_factor (float): Factor after a step with inf or nan. Default: 0.5.
        growth_interval (int): Steps between growths. Default: 2000.
        enabled (bool): False makes every method do nothing. Default: True.

    Example:
        >>> scaler = fusedopt.GradScaler("cuda")
        >>> scaler.scale(loss).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()

    Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018, arXiv:1710.03740.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Runs ``optimizer.step()`` on unscaled gradients, or skips it when they hold inf or nan.

        Args:
            optimizer: Whose gradients were made from the scaled loss.
            *args: For ``optimizer.step``.
            **kwargs: For ``optimizer.step``; a closure is refused, as by torch.

        Returns:
            What ``optimizer.step`` returned.

        Raises:
            RuntimeError: With torch's text, for a closure or a second step before ``update()``.
            AssertionError: With torch's text, when no parameter has a gradient.
        """
        if not self._enabled or not isinstance(optimizer, FusedOptimizer):
            return super().step(optimizer, *args, **kwargs)
        ours = self._per_optimizer_states[id(optimizer)]
        if ours["stage"] is OptState.STEPPED or "closure" in kwargs or self._scale is None:
            return super().step(optimizer, *args, **kwargs)
        if ours["stage"] is OptState.READY:
            result = self._step_and_look(optimizer, ours, *args, **kwargs)
        else:
            result = self._step_as_found(optimizer, ours, *args, **kwargs)
        ours["stage"] = OptState.STEPPED
        return result

    def _step_and_look(
        self, optimizer: Any, ours: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Steps on gradients that nobody has looked at yet."""
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]):
            raise AssertionError("No inf checks were recorded for this optimizer.")
        scale: Any = self._get_scale_async()
        preset = getattr(optimizer, "grad_scale", None)
        optimizer.grad_scale = scale if preset is None else scale * preset
        try:
            result, found_inf = optimizer._step_for_scaler(*args, **kwargs)
        finally:
            del optimizer.grad_scale
        if found_inf is None and not self._check_inf_per_device(optimizer):
            found_inf = torch.zeros((), device=scale.device)
        if found_inf is not None:
            ours["found_inf_per_device"] = {found_inf.device: found_inf}
        return result

    def _step_as_found(
        self, optimizer: Any, ours: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Steps after `unscale_`, which has looked, without waiting for what it found."""
        found = list(ours["found_inf_per_device"].values())
        if not found:
            raise AssertionError("No inf checks were recorded for this optimizer.")
        optimizer.found_inf = torch.stack([flag.to(found[0].device) for flag in found]).sum()
        try:
            return optimizer.step(*args, **kwargs)
        finally:
            del optimizer.found_inf
            if hasattr(optimizer, "grad_scale"):
                del optimizer.grad_scale
