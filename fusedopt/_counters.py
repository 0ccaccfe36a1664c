"""The counters of applied steps: one small buffer for many parameters, a 0-dim view each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class StepCounters:
    """Hands out and keeps one float32 counter a parameter.

    Where torch's state has ``step``, that entry becomes the counter, so checkpoints hold what they
    always held. A rule without ``step`` (SGD) has a hidden counter that says whether its momentum
    buffer has been set: zero means not yet, as after a first step that was skipped.
    """

    def __init__(self) -> None:
        self._views: dict[Tensor, Tensor] = {}
        self._unset_buffers: dict[Tensor, Tensor] = {}

    def adopt(
        self, params: Iterable[Tensor], state: dict[Tensor, Any], device: torch.device
    ) -> None:
        """Gives every parameter a counter on ``device`` and moves the ``step`` of its state there.

        A counter that a captured graph may hold is never moved: parameters that have one keep it.
        """
        params = list(params)
        new = [p for p in params if p not in self._views]
        buffer = torch.zeros(len(new), dtype=torch.float32, device=device)
        self._views.update((p, buffer[i]) for i, p in enumerate(new))
        for param in params:
            counter = self._views[param]
            entries = state.get(param, {})
            if "step" in entries:
                if entries["step"] is not counter:
                    counter.copy_(torch.as_tensor(entries["step"]).reshape(()))
                    entries["step"] = counter
                continue
            buffer = entries.get("momentum_buffer")
            if buffer is None:
                counter.zero_()
            elif buffer is not self._unset_buffers.get(param):
                counter.fill_(1.0)
                self._unset_buffers.pop(param, None)

    def view(self, param: Tensor) -> Tensor:
        """Returns the counter of a parameter that was adopted."""
        return self._views[param]

    def host_steps(
        self, state: dict[Tensor, Any], params: Iterable[Tensor]
    ) -> dict[Tensor, Tensor]:
        """Returns the ``step`` of these parameters in the CPU's memory, by one copy for all."""
        counted = [
            param
            for param in params
            if "step" in state.get(param, {}) and state[param]["step"].device.type != "cpu"
        ]
        if not counted:
            return {}
        copy = torch.stack([state[param]["step"] for param in counted]).cpu()
        return {param: copy[i] for i, param in enumerate(counted)}

    def add_unset_buffer(self, param: Tensor, buffer: Tensor) -> None:
        """Notes that ``buffer`` is memory for a momentum that no step has set yet."""
        self._unset_buffers[param] = buffer

    def unset_buffers(self, state: dict[Tensor, Any]) -> list[Tensor]:
        """Returns the parameters whose momentum buffer is not set yet; may synchronise."""
        for param, buffer in list(self._unset_buffers.items()):
            moved_on = state.get(param, {}).get("momentum_buffer") is not buffer
            if moved_on or (param in self._views and self._views[param].item() > 0):
                del self._unset_buffers[param]
        return list(self._unset_buffers)
